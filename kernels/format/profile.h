// A profile: data that codecs need per (layer, KV head) of a layer group, made by calibration or from a
// sequence's first block. It is immutable once shared; blocks carry its hash.
//
// K is coded as k' = (k - mean) * gain, and queries are divided by gain, so that
//     q . k = (q / gain) . k' + q . mean
// exactly; the second term is constant over tokens, so softmax does not change and backends add it to the
// logits of the run (before soft-cap), which also keeps the log-sum-exp right. V is coded as it is.
// `transform` (stored_dim x stored_dim, row-major) and `widths` (bits of each of 8 groups of 16 coefficients)
// are carried for calibrated types; today's types leave them empty.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/format/block_layout.h"

namespace kvtide {

struct HeadProfile {
  std::vector<float> mean;       // [head_dim], empty = 0
  std::vector<float> gain;       // [head_dim], empty = 1; finite and positive
  std::vector<float> transform;  // empty = the type's own rotation
  std::vector<uint8_t> widths;   // empty = the type's own width
  bool operator==(const HeadProfile&) const = default;
};

struct Profile {
  GroupShape shape;
  std::vector<HeadProfile> k;  // [layers * kv_heads], layer-major
  std::vector<HeadProfile> v;
  uint64_t hash = 0;  // of the contents, by HashProfile; 0 = no profile

  const HeadProfile& key(int layer, int kv_head) const {
    return k[static_cast<size_t>(layer) * static_cast<size_t>(shape.kv_heads) + static_cast<size_t>(kv_head)];
  }
};

// XXH3 over the shape and all values; never 0.
uint64_t HashProfile(const Profile& profile);

}  // namespace kvtide
