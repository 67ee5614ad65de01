// Backend::Recode on a GPU for pieces of one kind: layouts and profiles are equal, and all pieces count all
// their tokens or none does. One upload, the kernels of K and V one after the other on one stream, one wait.
#pragma once

#include <span>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/device/profile_store.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

bool SameKind(const RecodePiece& a, const RecodePiece& b);
absl::Status RecodeCall(std::span<const RecodePiece> pieces, ProfileStore& profiles, Workspace& workspace);

}  // namespace kvtide::cuda
