// How long the parts of prefill groups are: plain arithmetic, so that it is tested without CUDA. The GPU
// takes parts as they come, so the caller puts long ones first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvtide::cuda {

// What `ctas` CTAs need at least for parts of at most `length` pages, longest first, in pages: the work
// spread evenly, and for every k the k + 1 of the first k * ctas + 1 parts that one CTA must take. A part
// costs `overhead` pages of its own, and pages are computed `together` at a time.
inline int64_t LeastPages(const std::vector<int>& pages_of_groups, int length, int ctas, int overhead,
                          int together, int64_t* parts) {
  constexpr int kMergeLaunch = 4, kStatesInAPage = 24;
  std::vector<int64_t> counts(static_cast<size_t>(length / together) + 1);  // of parts, by tiles
  int64_t states = 0;
  for (const int pages : pages_of_groups) {
    if (pages > length) states += (pages + length - 1) / length;
    counts.back() += pages / length;
    if (pages % length > 0) counts[static_cast<size_t>((pages % length + together - 1) / together)]++;
  }
  int64_t least = 0, work = 0;
  *parts = 0;
  for (size_t tiles = counts.size() - 1; tiles > 0; tiles--) {
    if (counts[tiles] == 0) continue;
    const int64_t cost = static_cast<int64_t>(tiles) * together + overhead;
    *parts += counts[tiles];
    work += counts[tiles] * cost;
    least = std::max(least, ((*parts - 1) / ctas + 1) * cost);
  }
  const int64_t merge = states == 0 ? 0 : kMergeLaunch + states / kStatesInAPage;
  return std::max(least, (work + ctas - 1) / ctas) + merge;
}

// Pages of a part, a multiple of `together`, so that the parts of all groups, at most `most_parts` (not fewer
// than groups), are soon done by `ctas` CTAs.
inline int PartPages(const std::vector<int>& pages_of_groups, int ctas, int overhead, size_t most_parts,
                     int together = 1) {
  int longest = 1;
  for (const int pages : pages_of_groups) longest = std::max(longest, pages);
  int best = 0;
  int64_t least = INT64_MAX;
  for (int cuts = 1; cuts <= 64; cuts++) {
    const int length = ((longest + cuts - 1) / cuts + together - 1) / together * together;
    int64_t parts = 0;
    const int64_t cost = LeastPages(pages_of_groups, length, ctas, overhead, together, &parts);
    if (cuts > 1 && parts > static_cast<int64_t>(most_parts)) break;
    if (cost < least) {
      least = cost;
      best = length;
    }
    if (length <= together) break;
  }
  return best;
}

}  // namespace kvtide::cuda
