// Which blocks of a sequence stay exact (f16): the first and the last full ones, and the tail that is being
// filled. One function for the planner, which predicts bytes, and for the cache, which allocates them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/format/page_order.h"

namespace kvtide {

// Full blocks kept exact at either end. The default keeps 1 + 2 blocks: 192 tokens, 0.09 bits per value at
// 32K.
struct ExactWindow {
  int first_blocks = 1;
  int last_blocks = 2;
  bool operator==(const ExactWindow&) const = default;
};

struct BlockCounts {
  int64_t exact = 0;  // f16 blocks, the tail included
  int64_t coded = 0;  // blocks in the pair of the sequence
};

// Blocks that a sequence of `tokens` tokens holds at rest, in a layer group without a sliding window.
constexpr BlockCounts CountBlocks(int64_t tokens, ExactWindow window) {
  const int64_t full = tokens / kBlockTokens, tail = tokens % kBlockTokens != 0 ? 1 : 0;
  const int64_t coded = std::max<int64_t>(0, full - window.first_blocks - window.last_blocks);
  return {full - coded + tail, coded};
}

// With a sliding window, the first block that a sequence still holds: blocks wholly before `tokens - window`
// are gone, the first exact blocks too. The next query, at position `tokens`, sees positions from tokens -
// window + 1 on.
constexpr int64_t FirstLiveBlock(int64_t tokens, int64_t window) {
  return window <= 0 ? 0 : std::max<int64_t>(0, tokens - window + 1) / kBlockTokens;
}

// True if block `index` of a sequence with `full` full blocks is in the exact window.
constexpr bool IsExactBlock(int64_t index, int64_t full, ExactWindow window) {
  return index < window.first_blocks || index >= full - window.last_blocks;
}

// Blocks held at rest, sliding window included (window 0 = full attention).
constexpr BlockCounts CountLiveBlocks(int64_t tokens, ExactWindow exact, int64_t window) {
  const int64_t first_live = FirstLiveBlock(tokens, window);
  if (first_live == 0) return CountBlocks(tokens, exact);
  const int64_t full = tokens / kBlockTokens, tail = tokens % kBlockTokens != 0 ? 1 : 0;
  BlockCounts counts{tail, 0};
  const int64_t first_exact_end = std::min<int64_t>(full, exact.first_blocks);
  const int64_t last_exact_begin = std::max<int64_t>(first_exact_end, full - exact.last_blocks);
  counts.exact += std::max<int64_t>(0, first_exact_end - first_live);
  counts.coded = std::max<int64_t>(0, last_exact_begin - std::max(first_exact_end, first_live));
  counts.exact += std::max<int64_t>(0, full - std::max(last_exact_begin, first_live));
  return counts;
}

}  // namespace kvtide
