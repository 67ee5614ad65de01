// What coding does to the keys, the values and the logits of each layer, apart from what later layers make of
// it: the vectors of a piece of text are taken from a run with exact keys and values, coded, decoded and
// compared.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/engine/kv_store.h"
#include "clients/engine/llama_model.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/profile_maker.h"

namespace kvtide::cli {

// All root mean squares relative to that of the exact thing. Logits: of 64 late queries, each query's mean
// taken off both, because softmax does not see it.
struct LayerError {
  double key = 0;
  double value = 0;
  double logit = 0;
};

// Vectors of one layer: q [tokens][query_heads][head_dim], k and v [tokens][kv_heads][head_dim].
struct LayerVectors {
  std::vector<float> q, k, v;
};

// Runs the model over `tokens` with exact keys and values and keeps what each layer saw.
absl::StatusOr<std::vector<LayerVectors>> CaptureVectors(const engine::LlamaModel& model, ThreadPool& pool,
                                                         std::span<const int32_t> tokens);

// One entry per layer. The key profile is made from the first block, as the cache makes it.
std::vector<LayerError> MeasureLayerErrors(const engine::KvGeometry& geometry,
                                           std::span<const LayerVectors> layers, CachePair pair,
                                           const ProfileOptions& key_profile, ThreadPool& pool);

}  // namespace kvtide::cli
