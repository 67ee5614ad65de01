#include "daemon/cache/tier/ghost_keys.h"

#include <algorithm>
#include <bit>

namespace kvtide {

void GhostKeys::Add(const BlockKey& key, size_t blocks) {
  if (sets_.empty()) return;
  blocks_ = blocks;
  // A larger table begins empty: what it would need to say where its keys go is not kept.
  if (blocks > places()) sets_.assign(std::bit_ceil((blocks + kWays - 1) / kWays), {});
  drops_++;
  Set& set = SetOf(key);
  Place* oldest = &set[0];
  for (Place& place : set) {
    if (place.tag == TagOf(key) || place.tag == 0) {
      oldest = &place;
      break;
    }
    if (Age(place) > Age(*oldest)) oldest = &place;
  }
  *oldest = {TagOf(key), Now()};
}

bool GhostKeys::Take(const BlockKey& key) {
  if (sets_.empty()) return false;
  for (Place& place : SetOf(key)) {
    if (place.tag != TagOf(key)) continue;
    const bool remembered = Age(place) <= kSteps * blocks_ / places();
    place = {};
    return remembered;
  }
  return false;
}

}  // namespace kvtide
