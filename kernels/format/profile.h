// A profile: data that codecs need per (layer, KV head) of a layer group, made by calibration or from a
// sequence's first block. It is immutable once shared; blocks carry its hash.
//
// K is coded as k' = (k - mean) * gain, and queries are divided by gain, so that
//     q . k = (q / gain) . k' + q . mean
// exactly; the second term is constant over tokens, so softmax does not change and backends add it to the
// logits of the run (before soft-cap), which also keeps the log-sum-exp right. V is coded as it is.
//
// Calibrated types (tide.h) code y, the key turned back by its position ("before RoPE"), or, of a head
// without frequencies, the key as it is ("after RoPE"). With X = y - centre and coefficients z,
//     z_j = sum_i X_i transform[i][j]      X_i = sum_j inverse[i][j] z_j
// and the widths of the groups of 8 coefficients, for each of the calibrated types, or for the first
// kLeastTideTypes of them, as profiles have them that are older than the rest. Attention rebuilds keys
// that were turned back as they were, so mean and queries do not matter to it. To others it turns its
// queries,
//     q . k = sum_j (sum_i q_i inverse[i][j]) z_j + q . centre
// once for all tokens. Other types ignore all of this.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/rope.h"

namespace kvtide {

struct HeadProfile {
  std::vector<float> mean;       // [head_dim], empty = 0
  std::vector<float> gain;       // [head_dim], empty = 1; finite and positive
  Rope rope;                     // that keys of calibrated types take back; without frequencies they do not
  std::vector<float> centre;     // [head_dim], mean of the keys that calibrated types code
  std::vector<float> transform;  // [head_dim][head_dim], channel by coefficient; empty = none
  std::vector<float> inverse;    // the same shape
  std::vector<uint8_t> widths;   // [types][stored_dim / 8], 0..6; what lies above head_dim has 0

  // Whether calibrated types take RoPE back before they code a key of this head.
  bool turned_back() const { return !rope.frequencies.empty(); }
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
  // Of all heads alike (CheckProfileFor).
  bool keys_turned_back() const { return !k.empty() && k.front().turned_back(); }
};

// What calibrated types need of some layers' keys, as it is registered, kept and sent.
struct KeyTransforms {
  RopePairs pairs = RopePairs::kHalves;
  std::vector<float> frequencies;  // [layers][pairs], radians a position; empty = no RoPE is taken back
  std::vector<float> centres;      // [layers][kv_heads][head_dim_k]
  std::vector<float> matrices;     // [layers][kv_heads][head_dim_k][head_dim_k], channel by coefficient
  std::vector<uint8_t> widths;     // [layers][kv_heads][types][stored_dim / 8]
  bool empty() const { return matrices.empty(); }
  bool operator==(const KeyTransforms&) const = default;
};

// OK if keys of the type can be coded and attended with the profile, which may be null: a calibrated type
// needs a transform of the right size and widths of its own for every head, and heads that are all turned
// back or none.
// InvalidArgument says what to do.
absl::Status CheckProfileFor(CacheType key_type, const GroupShape& shape, const Profile* profile);

// Whether a profile of `heads` heads with so many widths of a stored dim has those of a calibrated type.
bool HasWidthsOf(CacheType type, size_t widths, size_t heads, int stored_dim);
bool HasWidthsOf(CacheType type, const GroupShape& shape, const KeyTransforms& transforms);
// The widths of a calibrated type, [stored_dim / 8]; the head has them.
std::span<const uint8_t> WidthsOf(CacheType type, const HeadProfile& head);

// Fills in `inverse`. InvalidArgument that says what is wrong with RoPE, means, transform or widths: sizes,
// values that are not finite, widths beyond a type's bits, or a transform that cannot be inverted in f32.
absl::Status CompleteTransform(int head_dim, HeadProfile& head);

// XXH3 over the shape and all values; never 0.
uint64_t HashProfile(const Profile& profile);

}  // namespace kvtide
