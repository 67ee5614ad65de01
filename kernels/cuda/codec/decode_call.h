// Backend::Decode and DecodeTokens on a GPU: layers of blocks to rows in host memory.
#pragma once

#include <cstddef>
#include <span>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/device/profile_store.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

absl::Status DecodeCall(const DecodeArgs& args, ProfileStore& profiles, Workspace& workspace);
// Pieces are checked (check_pieces.h). Many blocks at once: one launch and one copy for each side of up to
// kDecodeBytes of rows in f32. Looks at the cancellation between them.
absl::Status DecodeTokensCall(std::span<const DecodePiece> pieces, const Cancellation* cancellation,
                              ProfileStore& profiles, Workspace& workspace);
inline constexpr size_t kDecodeBytes = size_t{16} << 20;

}  // namespace kvtide::cuda
