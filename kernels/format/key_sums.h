// What a calibration gathers of one layer group: sums over the keys and queries of each head, and keys that
// are held back, on which the profile that is made of the sums is measured (tide_maker.h). The same rows in
// the same order give the same profile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/thread_pool.h"
#include "kernels/format/tide_maker.h"

namespace kvtide {

// Error of logits on the tokens that were held back, the same bits for both (2 beside tide1): mean square of (q . error of a
// key) over queries, tokens and heads, relative to that of (q . (key minus mean)).
struct KeyTypeError {
  std::string type, beside;  // tide3, turbo3 around the calibrated mean
  double error = 0, beside_error = 0;
};

// The sums that an error is made of; those of several layer groups are added.
struct KeyTypeHarm {
  CacheType type{}, beside{};
  double own = 0, of_beside = 0, of_leaving_out = 0;
};

// The errors; InvalidArgument names the first type that is not better than the one of the same bits beside
// it.
absl::Status CompareKeyTypes(std::span<const KeyTypeHarm> harms, std::vector<KeyTypeError>* errors);

class KeySums {
 public:
  // `query_heads`: a multiple of the KV heads. `ropes`: that are taken back, one for each layer; empty =
  // none. The pool is borrowed. Room for so many held back tokens is taken with the first of them; there may
  // be more.
  KeySums(const GroupShape& shape, int query_heads, std::span<const Rope> ropes, ThreadPool* pool,
          int64_t held_back_tokens = 0);

  // Of n tokens of one layer from `position` on: k [n][kv_heads][head_dim_k], q [n][query_heads][head_dim_k],
  // as attention meets them.
  void AddKeys(int layer, int64_t position, int n, const float* k);
  void AddQueries(int layer, int64_t position, int n, const float* q);
  void HoldBackKeys(int layer, int64_t position, int n, const float* k);
  void HoldBackQueries(int layer, int64_t position, int n, const float* q);

  // Tokens that a layer was given to add.
  int64_t keys(int layer) const { return HeadOf(layer).keys(); }
  // Of a layer, [kv_heads][head_dim_k].
  std::vector<float> Means(int layer) const;
  // Means and transforms. InvalidArgument as MakeTideProfile has it.
  absl::StatusOr<Profile> MakeProfile(const TideBudget& budget = {}) const {
    return MakeTideProfile(shape_, heads_, budget);
  }
  // Harm of each calibrated type, and of turbo of the same bits or the least, on what was held back. InvalidArgument if
  // that is nothing.
  absl::StatusOr<std::vector<KeyTypeHarm>> Measure(const Profile& profile) const;

  // What it takes in memory with so many tokens held back; +infinity beyond int64.
  static double Bytes(const GroupShape& shape, int64_t held_back_tokens);

 private:
  struct HeldKeys {
    std::vector<int64_t> positions;
    std::vector<float> rows;  // [tokens][head_dim_k]
  };
  class Harm;

  const KeyStatistics& HeadOf(int layer) const {
    return heads_[static_cast<size_t>(layer) * static_cast<size_t>(shape_.kv_heads)];
  }
  void EachHead(int layer, absl::FunctionRef<void(int64_t head, size_t index)> body) const;

  const GroupShape shape_;
  const int query_heads_;
  const size_t held_back_tokens_;
  ThreadPool* const pool_;
  std::vector<KeyStatistics> heads_, held_heads_;  // layer-major; of what is held back only queries
  std::vector<HeldKeys> held_;                     // of each head
};

}  // namespace kvtide
