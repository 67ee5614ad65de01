// Profiles of calibrated keys for tests: made without libm, so that golden files hold on every machine.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/format/profile.h"
#include "kernels/format/tide.h"
#include "tests/format/test_rows.h"

namespace kvtide::test {

// RoPE of half or all channels, as neighbours or halves.
inline Rope TideRope(int dim, uint64_t seed, float frequency = 1) {
  Rope rope;
  rope.pairs = seed % 2 == 0 ? RopePairs::kHalves : RopePairs::kNeighbours;
  for (int i = 0; i < (seed % 3 == 0 ? dim / 4 : dim / 2); i++) {
    rope.frequencies.push_back(frequency);
    frequency *= 0.75f;
  }
  return rope;
}

// Means, RoPE, a transform that mixes all channels of rows of variance 1 and random
// widths, 0 and 6 among them.
inline HeadProfile TideHead(int dim, uint64_t seed) {
  Random random(seed);
  HeadProfile head;
  head.rope = TideRope(dim, seed);
  for (int i = 0; i < dim; i++) head.centre.push_back(random.Bell());
  for (int i = 0; i < dim; i++) head.mean.push_back(random.Bell());
  for (int i = 0; i < dim; i++)
    for (int j = 0; j < dim; j++)
      head.transform.push_back((i == j ? 1.0f : 0.0f) + random.Bell() / static_cast<float>(2 * dim));
  const size_t groups = static_cast<size_t>(StoredDim(dim) / kTideGroup);
  head.widths.assign(kTideTypes * groups, 0);
  for (size_t type = 0; type < kTideTypes; type++) {
    uint8_t* widths = head.widths.data() + type * groups;
    const int units = TideUnits(kTideBits[type], StoredDim(dim)), widest = std::min(units, kMostTideWidth);
    widths[random.Below(dim / kTideGroup)] = static_cast<uint8_t>(widest);
    for (int left = units - widest, tries = 0;
         left > 0 && tries < 10000; tries++)
      if (uint8_t& width = widths[1 + random.Below(dim / kTideGroup - 1)]; width < kMostTideWidth) {
        width++;
        left--;
      }
  }
  const absl::Status status = CompleteTransform(dim, head);
  KVTIDE_CHECK(status.ok(), status.ToString());
  return head;
}

// The same for keys that are coded as they are stored, after RoPE.
inline HeadProfile AfterRope(HeadProfile head) {
  head.rope.frequencies.clear();
  return head;
}

inline Profile TideProfile(const GroupShape& shape, uint64_t seed) {
  Profile profile;
  profile.shape = shape;
  for (int h = 0; h < shape.layers * shape.kv_heads; h++) {
    profile.k.push_back(TideHead(shape.head_dim_k, seed + static_cast<uint64_t>(h)));
    profile.k.back().rope = TideRope(shape.head_dim_k, seed, h < shape.kv_heads ? 1.0f : 0.5f);
  }
  profile.hash = HashProfile(profile);
  return profile;
}
inline Profile AfterRope(Profile profile) {
  for (HeadProfile& head : profile.k) head = AfterRope(std::move(head));
  profile.hash = HashProfile(profile);
  return profile;
}

}  // namespace kvtide::test
