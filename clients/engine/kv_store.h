// Where the engine's keys and values live. The engine computes q, k and v of a few tokens in one layer, hands
// them over and gets the attention output back; it keeps none of them. LocalKvStore holds them in this
// process (the yardstick), DaemonKvStore in kvtided. Calls of one store come from one thread at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/format/profile.h"

namespace kvtide::engine {

using SequenceId = uint64_t;

struct KvGeometry {
  int layers = 0;
  int query_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int sliding_window = 0;          // 0 = all layers attend over every token
  std::vector<int> layer_windows;  // of each layer; empty = sliding_window
  float attention_scale = 0;       // 0 = 1/sqrt(head_dim)
  float softcap = 0;               // 0 = none; else logit = softcap * tanh(logit / softcap)
  // Of each layer, [kv_heads][head_dim], for sequences that are centred by calibration; empty = none.
  std::vector<std::vector<float>> key_means;
  std::vector<KeyTransforms> key_transforms;  // of each layer, for calibrated K types; empty = none
  std::vector<Rope> ropes;                    // of each layer, that keys come with; empty = none

  // Logits are scale() * q.k.
  float scale() const;
  int window(int layer) const {
    return layer_windows.empty() ? sliding_window : layer_windows[static_cast<size_t>(layer)];
  }
  size_t query_width() const { return static_cast<size_t>(query_heads) * head_dim; }
  size_t kv_width() const { return static_cast<size_t>(kv_heads) * head_dim; }
};

class KvStore {
 public:
  virtual ~KvStore() = default;

  virtual const KvGeometry& geometry() const = 0;

  virtual absl::StatusOr<SequenceId> CreateSequence() = 0;

  // What the tokens at start, start + 1, ... are, before they are appended. A store may find them again by
  // it.
  virtual void NextTokens(SequenceId /*sequence*/, int64_t /*start*/, std::span<const int32_t> /*tokens*/) {}

  // Appends k and v ([n_tokens][kv_heads][head_dim], keys after RoPE) of the tokens at start, start + 1, ...
  // in one layer, and attends causally with q ([n_tokens][query_heads][head_dim]) over everything up to each
  // token itself; out has the shape of q. `start` must be the layer's length. All layers of a chunk come in
  // order 0, 1, ...; the tokens count as stored when the last layer has them.
  virtual absl::Status AppendAttend(SequenceId sequence, int layer, int64_t start, int n_tokens,
                                    const float* q, const float* k, const float* v, float* out) = 0;

  // A second sequence with the same tokens; the two grow apart from here.
  virtual absl::StatusOr<SequenceId> Fork(SequenceId sequence) = 0;

  // Forgets the tokens from `length` on. Also drops a chunk that reached only some layers.
  virtual absl::Status Truncate(SequenceId sequence, int64_t length) = 0;

  virtual absl::Status Close(SequenceId sequence) = 0;
};

}  // namespace kvtide::engine
