// Checks the arguments of an attention call; both ways of computing it (attend_call.h, prefill_call.h) start
// here.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace kvtide::cuda {

// InvalidArgument if they do not fit together. `shape` is that of all runs; null if there are no items.
absl::Status CheckAttendArgs(const AttendArgs& args, const GroupShape** shape);

inline int64_t BlocksOf(const BlockRun& run) { return (run.tokens + kBlockTokens - 1) / kBlockTokens; }

}  // namespace kvtide::cuda
