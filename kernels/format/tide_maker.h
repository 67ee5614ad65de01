// Makes the profiles of calibrated keys (tide.h) from the keys and queries of a calibration text, both as
// attention meets them (after RoPE) and turned back here by their positions. Pure functions; the same sums
// give the same profile.
//
// Per KV head: an error e of a key that is turned back moves the logit of a query q, turned back too, by
// q . R(-n) e, where R(-n) is RoPE of the n tokens by which the key stands before it. Its harm is e' Q e with
// Q = E[R(n) q q' R(-n)] over the queries of the head's group and all distances n of the text's windows. In
// the frame Q^1/2 (k - mean) all directions count alike; there the Karhunen-Loeve transform takes the keys
// apart into uncorrelated coefficients, which are scaled to variance 1. Transform coding with a perceptual
// metric, applied to keys; the queries' metric as in OSCAR (arXiv 2605.17757) and its relatives. Each bit
// goes to the group of 8 coefficients whose expected harm it lowers most, inside a fixed budget for each
// head, so that every record of a type has the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/format/profile.h"
#include "kernels/format/tide.h"

namespace kvtide {

// Sums over the keys of one KV head and the queries of its group.
class KeyStatistics {
 public:
  KeyStatistics(int head_dim, const Rope& rope);
  // `n` rows of head_dim values, `stride` values apart, of the tokens at `position` and after it.
  void AddKeys(const float* rows, int n, size_t stride, int64_t position);
  // Of `heads` query heads, whose rows lie behind each other. Sums do not depend on how tokens are cut.
  void AddQueries(const float* rows, int n, size_t stride, int64_t position, int heads = 1);

  int head_dim() const { return static_cast<int>(dim_); }
  const Rope& rope() const { return rope_; }
  int64_t keys() const { return keys_; }
  std::vector<double> Mean() const;    // [head_dim], of the keys as they come
  std::vector<double> Centre() const;  // [head_dim], of the keys turned back
  std::vector<double> KeyCovariance()
      const;                                // [head_dim][head_dim], of the keys turned back, about their mean
  std::vector<double> QueryMetric() const;  // [head_dim][head_dim], E[R(n) q q' R(-n)]

 private:
  void AddTurnedBack(const float* rows, int n, size_t stride, int heads, int64_t position, double* sum,
                     std::vector<double>& products) const;

  size_t dim_;
  Rope rope_;
  int64_t keys_ = 0, queries_ = 0, span_ = 0;  // span: one more than the last position
  std::vector<double> sum_, turned_sum_, key_products_, query_products_;  // products: empty = all 0
};

// Units of 64 bytes that the widths of a head may add up to, for each calibrated type; 0 = as many as its
// pages hold. Less is for measuring lower rates: pages keep their size, and what a head leaves is zero.
struct TideBudget {
  int units[kTideTypes] = {};
};

// Of all heads of a layer group, layer-major. InvalidArgument with fewer than 4 keys for each channel,
// without queries, or with a budget beyond what pages hold.
absl::StatusOr<Profile> MakeTideProfile(const GroupShape& shape, std::span<const KeyStatistics> heads,
                                        const TideBudget& budget = {});

// A profile from its parts, as they are registered and stored: means [layers][kv_heads][head_dim_k] and the
// transforms of all layers. InvalidArgument names the head and what is wrong.
absl::StatusOr<Profile> MakeCalibratedProfile(const GroupShape& shape, std::span<const float> means,
                                              const KeyTransforms& transforms);
// The parts again.
KeyTransforms TransformsOf(const Profile& profile);

}  // namespace kvtide
