// What tests send to a cache, one layer at a time: random rows, queries and the calls that carry them.
// Tensors live in these objects, calls point into them.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "daemon/cache/kv_cache.h"

namespace kvtide::testing {

std::vector<float> RandomRows(std::mt19937& random, size_t count, float spread = 1.0f);

inline const LayerGroupSpec& GroupOf(const ModelSpec& model, int layer) {
  return model.groups[static_cast<size_t>(model.layers[static_cast<size_t>(layer)].group)];
}

// New rows of one layer. Keys have channels with a mean, as models' keys do.
struct NewRows {
  NewRows(const ModelSpec& model, int of_layer, int64_t count, std::mt19937& random);
  LayerKv Kv() const;

  int layer = 0;
  int64_t tokens = 0;
  std::vector<float> k, v;
};

// Attention of one sequence by one layer, with random queries.
class LayerCall {
 public:
  LayerCall(const ModelSpec& model, int layer, SequenceId sequence, int64_t queries, int64_t first_position,
            std::mt19937& random);
  LayerCall(const LayerCall&) = delete;
  LayerCall& operator=(const LayerCall&) = delete;

  // Rows that the call appends where its queries begin.
  void Append(const NewRows& rows);
  AttendCall& call() { return call_; }

  std::vector<float> q, out, lse;

 private:
  AttendRequest item_;
  AttendCall call_;
};

}  // namespace kvtide::testing
