// Makes a key profile from what a model's layers see of a text: a KvStore's visitor (CaptureKvStore) hands
// over keys and queries, some for the profile, some held back to measure it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/engine/key_profile.h"
#include "kernels/base/thread_pool.h"
#include "kernels/format/key_sums.h"

namespace kvtide::engine {

using kvtide::KeyTypeError;

// Whether transforms are of keys with RoPE taken back or of keys as they are stored.
enum class KeysAt { kBeforeRope, kAfterRope };

class KeyCalibration {
 public:
  // The pool is borrowed.
  KeyCalibration(const KvGeometry& geometry, KeysAt keys, ThreadPool& pool);

  // Of n tokens of one layer from `position` on: q [n][query_heads][head_dim], k [n][kv_heads][head_dim],
  // after RoPE.
  void Add(int layer, int64_t position, int n, const float* q, const float* k);
  void HoldBack(int layer, int64_t position, int n, const float* q, const float* k);

  // Tokens that the first layer was given.
  int64_t tokens() const { return sums_.keys(0); }
  // Every layer was given a token.
  std::vector<std::vector<float>> means() const;
  // Adds transforms and widths to a profile with these means. INVALID_ARGUMENT if the text is too short, or
  // if a type's error on the held-back tokens is not below that of turbo; `errors` says how they compare.
  absl::Status AddTransforms(KeyProfile* profile, std::vector<KeyTypeError>* errors,
                             const TideBudget& budget = {}) const;

 private:
  const KvGeometry geometry_;
  const KeysAt keys_;
  KeySums sums_;
};

}  // namespace kvtide::engine
