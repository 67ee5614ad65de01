// What coding does to the keys, the values, the logits and the attention of each layer, apart from what later
// layers make of it: vectors that a model made with exact keys and values are coded, decoded and compared.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cli/eval/eval_policy.h"
#include "clients/engine/kv_store.h"
#include "clients/engine/llama_model.h"
#include "kernels/base/thread_pool.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/profile_maker.h"

namespace kvtide::cli {

// Of one layer. Key, value, logit and output: root mean squares of the error relative to that of the exact
// thing. Keys, values and logits are those of every token coded; of logits each query's mean is taken off,
// because softmax does not see it. Attention is measured as a sequence is kept: tokens of the exact window
// stay exact.
struct LayerError {
  double key = 0;
  double value = 0;
  double logit = 0;
  double output = 0;         // of the attention output
  double output_cosine = 1;  // between exact and coded output, mean over queries and heads
  double weight_kld = 0;     // divergence of the attention weights, nats per query and head
  double weight_top1 = 1;    // how often the most attended token is the same

  bool operator==(const LayerError&) const = default;
};

// The plain mean over layers.
LayerError MeanError(std::span<const LayerError> layers);

struct LayerShape {
  int query_heads = 0, kv_heads = 0;
  int head_dim_k = 0, head_dim_v = 0;
  float scale = 0;             // logits are scale * q.k
  int64_t sliding_window = 0;  // 0 = every token is seen
  float softcap = 0;           // 0 = none; else logit = softcap * tanh(logit / softcap)
};
LayerShape ShapeOf(const engine::KvGeometry& geometry, int layer);

// Vectors of one layer: k [tokens][kv_heads][head_dim_k], v [tokens][kv_heads][head_dim_v], q
// [queries][query_heads][head_dim_k] of the last tokens, sinks [query_heads] or empty.
struct LayerVectors {
  std::vector<float> q, k, v, sinks;
};

// Runs the model over `tokens` with exact keys and values and keeps what each layer saw.
absl::StatusOr<std::vector<LayerVectors>> CaptureVectors(const engine::LlamaModel& model, ThreadPool& pool,
                                                         std::span<const int32_t> tokens);

// One layer and its exact attention at the last (at most 64) queries, ready to be compared with any pair.
class LayerProbe {
 public:
  // The vectors have the shape; at least one token and one query, not more queries than tokens.
  LayerProbe(const LayerShape& shape, const LayerVectors& vectors, ThreadPool& pool);

  // The key profile is made from the first block, as the cache makes it, unless a calibrated one is given, of
  // each KV head: then it is that and nothing else.
  LayerError Measure(CachePair pair, const ProfileOptions& key_profile, const WindowPolicy& policy,
                     ThreadPool& pool, std::span<const HeadProfile> calibrated = {}) const;

 private:
  // Exact attention of one query of one head over tokens [first, position].
  struct Query {
    const float* q = nullptr;  // inside Head::q
    int first = 0, position = 0;
    std::vector<float> raw;     // scaled
    std::vector<float> logits;  // soft-capped
    double lse = 0;             // of the logits and the sink
    int top = 0;
    std::vector<float> output;
  };
  struct Head {
    std::vector<float> k, v;                // [tokens][head_dim]
    std::vector<std::vector<float>> q;      // [head of the group][query][head_dim_k]
    std::vector<std::vector<Query>> exact;  // the same order
  };
  struct Sums;
  Query Attend(const Head& head, const float* q, int position, float sink) const;
  void Compare(const Query& query, const std::vector<float>& key_error, const std::vector<float>& mixed_v,
               const std::vector<char>& exact_token, float sink, Sums* sums) const;

  const LayerShape shape_;
  int tokens_ = 0;
  std::vector<float> sinks_;  // by query head; -infinity without
  std::vector<Head> heads_;   // by KV head
};

}  // namespace kvtide::cli
