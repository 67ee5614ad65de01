// What coded blocks may be recoded as when their tier needs room: to fewer bits, instead of being dropped.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/format/block_layout.h"

namespace kvtide {

struct Ladder {
  // The first is what blocks are coded as, each further one takes fewer bytes. One address for each content
  // (Sequences::LadderOf).
  std::vector<const BlockLayout*> rungs;

  // The next rung below; null: it is the last one, or none of the ladder's.
  const BlockLayout* Below(const BlockLayout* rung) const {
    const auto found = std::find(rungs.begin(), rungs.end(), rung);
    return found != rungs.end() && found + 1 != rungs.end() ? *(found + 1) : nullptr;
  }
  bool Has(const BlockLayout* layout) const {
    return std::find(rungs.begin(), rungs.end(), layout) != rungs.end();
  }
};

}  // namespace kvtide
