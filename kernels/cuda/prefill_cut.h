// How long the parts of prefill groups are: plain arithmetic, so that it is tested without CUDA.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvtide::cuda {

// Pages of a part, so that the parts of all groups, at most `most_parts` (not fewer than groups), fill `ctas`
// CTAs in whole waves; `overhead` is a part's own cost in pages, which are computed `together` at a time.
inline int PartPages(const std::vector<int>& pages_of_groups, int ctas, int overhead, size_t most_parts,
                     int together = 1) {
  int longest = 1;
  for (const int pages : pages_of_groups) longest = std::max(longest, pages);
  int best = longest;
  int64_t least = INT64_MAX;
  for (int cuts = 1; cuts <= 64; cuts++) {
    const int length = ((longest + cuts - 1) / cuts + together - 1) / together * together;
    int64_t parts = 0;
    for (const int pages : pages_of_groups) parts += (pages + length - 1) / length;
    if (cuts > 1 && parts > static_cast<int64_t>(most_parts)) break;
    const int64_t waves = (parts + ctas - 1) / ctas, cost = waves * (length + overhead);
    if (cost < least) {
      least = cost;
      best = length;
    }
    if (length <= together) break;
  }
  return best;
}

}  // namespace kvtide::cuda
