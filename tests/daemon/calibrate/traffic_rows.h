// Traffic for tests of calibrations: rows of keys and queries with a few strong directions, turned by RoPE at
// their positions, as calls bring them.
#pragma once

#include <cstdint>
#include <vector>

#include "daemon/cache/call/model.h"
#include "daemon/cache/call/traffic.h"
#include "kernels/format/rope.h"

namespace kvtide::testing {

// One layer group: 2 layers, 2 KV heads of 32, 4 query heads.
ModelSpec TrafficModel();
Rope TrafficRope();

struct TrafficTokens {
  // `strong`: the channel of each 8 that carries the energy.
  TrafficTokens(uint32_t seed, int64_t position, int tokens, int strong = 1);
  TrafficRows Rows() const;

  int64_t position = 0;
  int tokens = 0;
  std::vector<float> k, q;
};

}  // namespace kvtide::testing
