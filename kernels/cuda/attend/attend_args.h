// Checks the arguments of an attention call; both ways of computing it (attend_call.h, prefill_call.h) start
// here.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace kvtide::cuda {

// InvalidArgument if they do not fit together. `shape` is that of all runs; null if there are no items.
absl::Status CheckAttendArgs(const AttendArgs& args, const GroupShape** shape);

// Pages of `tokens` tokens from position `first_position` on that any of the queries [first, last] of an item
// sees.
struct PageRange {
  int64_t begin = 0, end = 0;
};
PageRange VisiblePages(const AttendArgs& args, const AttendItem& item, int64_t first_position, int64_t tokens,
                       int64_t first, int64_t last);

inline int64_t BlocksOf(const BlockRun& run) { return (run.tokens + kBlockTokens - 1) / kBlockTokens; }

}  // namespace kvtide::cuda
