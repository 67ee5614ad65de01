// Backend::Append on a GPU: the rows of all pieces of a call, whatever tensors they come from, in one staging
// buffer, read by one kernel, with one wait.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

// in_place_bytes: up to so many, the kernel reads the rows in pinned memory of the host.
absl::Status AppendCall(const AppendArgs& args, size_t in_place_bytes, Workspace& workspace);

}  // namespace kvtide::cuda
