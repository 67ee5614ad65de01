// Backend::Decode on a GPU: one layer of a block to rows in host memory.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

absl::Status DecodeCall(const DecodeArgs& args, Workspace& workspace);

}  // namespace kvtide::cuda
