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
#include "kernels/format/tide_maker.h"

namespace kvtide::engine {

// Error of logits on the tokens that were held back, the same bits for both: mean square of (q . error of a
// key) over queries, tokens and heads, relative to that of (q . (key minus mean)).
struct KeyTypeError {
  std::string type, beside;  // tide3, turbo3 around the calibrated mean
  double error = 0, beside_error = 0;
};

// Keys that are held back: tokens that follow each other.
struct HeldKeys {
  int64_t position = 0;
  std::vector<float> rows;  // [tokens][head_dim]
};

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
  int64_t tokens() const { return heads_.front().keys(); }
  // Every layer was given a token.
  std::vector<std::vector<float>> means() const;
  // Adds transforms and widths to a profile with these means. INVALID_ARGUMENT if the text is too short, or
  // if a type's error on the held-back tokens is not below that of turbo; `errors` says how they compare.
  absl::Status AddTransforms(KeyProfile* profile, std::vector<KeyTypeError>* errors) const;

 private:
  std::vector<KeyTypeError> Measure(const Profile& profile) const;

  const KvGeometry geometry_;
  const KeysAt keys_;
  ThreadPool& pool_;
  std::vector<KeyStatistics> heads_, held_heads_;  // layer-major; of what is held back only queries
  std::vector<std::vector<HeldKeys>> held_;        // of each head
};

}  // namespace kvtide::engine
