// The yardstick: attention in float64 over blocks, decoded to their original frame by the definition of the
// format (DecodeHalf). Slow and simple; every backend is compared with it.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace kvtide {

// As Backend::Attend, over blocks in host memory, on the caller's thread.
absl::Status ReferenceAttend(const AttendArgs& args);

}  // namespace kvtide
