// Which pages of a run queries see: plain arithmetic of positions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attend_args.h"
#include "kernels/backend.h"

namespace kvtide::cuda {

// Pages of `tokens` tokens from position `first_position` on that any of the queries [first, last] of an item
// sees.
struct PageRange {
  int64_t begin = 0, end = 0;
};
inline PageRange VisiblePages(const AttendPlanArgs& batch, const PlanItem& item, int64_t first_position,
                              int64_t tokens, int64_t first, int64_t last) {
  const int64_t base = item.first_query_position - first_position;
  const int64_t window = std::min(batch.window, kMostPosition);
  const int64_t end = batch.causal ? std::min(tokens, base + last + 1) : tokens;
  const int64_t begin = window > 0 ? std::max<int64_t>(0, base + first - window + 1) : 0;
  if (begin >= end) return {0, 0};
  return {begin / kBlockTokens, (end + kBlockTokens - 1) / kBlockTokens};
}

}  // namespace kvtide::cuda
