// How to make one large free extent out of many small ones, as a pure function: a stretch of a tier in, the
// blocks to move out. A block moves into a free extent of the same tier, or to the tier below where no
// extent takes it. The cache performs it; a move that turned out impossible leaves the rest useful.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "daemon/cache/tier/block_id.h"

namespace kvtide {

// Neighbouring bytes of a tier.
struct ExtentView {
  enum class Kind : uint8_t {
    kFree,
    kMovable,  // a block that nobody writes, moves or reads
    kFixed,
  };
  Kind kind = Kind::kFree;
  size_t bytes = 0;
  BlockId block = 0;         // of a movable one
  double demotion_cost = 0;  // beside 1 for each byte that is copied inside the tier; < 0: it may not go down
};

// Extents in order of address, none left out, the first one at `offset`.
struct StretchView {
  size_t offset = 0;
  std::vector<ExtentView> extents;
  size_t room_below = 0;     // free bytes of the tier below; 0 = there is none
  size_t largest_below = 0;  // its largest free extent
};

struct HoleMove {
  BlockId block = 0;
  std::optional<size_t> to;  // offset in the same tier; none: to the tier below
  bool operator==(const HoleMove&) const = default;
};

// [offset, offset + bytes) is free when all moves are done.
struct HolePlan {
  size_t offset = 0, bytes = 0;
  std::vector<HoleMove> moves;
  double cost = 0;
};

// The cheapest hole of at least `bytes` that can be made in the stretch: of the windows between fixed extents
// those with the fewest bytes in the way are tried first, up to a bound; blocks go into the free extents
// outside of the window, the largest first and each into the smallest that takes it.
std::optional<HolePlan> PlanHole(const StretchView& stretch, size_t bytes);

}  // namespace kvtide
