// Makes the profiles of calibrated keys (tide.h) from the keys and queries of a calibration text, both as
// attention meets them (after RoPE). Pure functions; the same sums give the same profile.
//
// Per KV head: an error e of a key moves a logit by q.e, so its harm is e' Q e with Q = E[q q'] over the
// queries of the head's group. In the frame Q^1/2 (k - mean) all directions count alike; there the
// Karhunen-Loeve transform takes the keys apart into uncorrelated coefficients, which are scaled to
// variance 1. Transform coding with a perceptual metric, applied to keys; the queries' metric as in OSCAR
// (arXiv 2605.17757) and its relatives. Each bit goes to the group of 8 coefficients whose expected harm it
// lowers most, inside a fixed budget for each head, so that every record of a type has the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/format/profile.h"

namespace kvtide {

// Sums over the keys of one KV head and the queries of its group.
class KeyStatistics {
 public:
  explicit KeyStatistics(int head_dim);
  // `n` rows of head_dim values, `stride` values apart.
  void AddKeys(const float* rows, int n, size_t stride);
  void AddQueries(const float* rows, int n, size_t stride);

  int head_dim() const { return static_cast<int>(dim_); }
  int64_t keys() const { return keys_; }
  std::vector<double> Mean() const;           // [head_dim]
  std::vector<double> KeyCovariance() const;  // [head_dim][head_dim], about the mean
  std::vector<double> QueryMoment() const;    // [head_dim][head_dim], E[q q']

 private:
  size_t dim_;
  int64_t keys_ = 0, queries_ = 0;
  std::vector<double> sum_, key_products_, query_products_;
};

// Of all heads of a layer group, layer-major. InvalidArgument with fewer than 4 keys for each channel, or
// without queries.
absl::StatusOr<Profile> MakeTideProfile(const GroupShape& shape, std::span<const KeyStatistics> heads);

// A profile from its parts, as they are registered and stored: means [layers][kv_heads][head_dim_k],
// transforms [layers][kv_heads][head_dim_k][head_dim_k], widths [layers][kv_heads][kTideTypes][stored_dim /
// 8]. InvalidArgument names the head and what is wrong.
absl::StatusOr<Profile> MakeCalibratedProfile(const GroupShape& shape, std::span<const float> means,
                                              std::span<const float> transforms,
                                              std::span<const uint8_t> widths);

}  // namespace kvtide
