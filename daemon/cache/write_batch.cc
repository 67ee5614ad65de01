#include "daemon/cache/write_batch.h"

#include <xxhash.h>

#include <algorithm>

#include "kernels/base/check.h"

namespace kvtide {

WriteBatch::~WriteBatch() {
  KVTIDE_CHECK(phase_ == Phase::kNew || phase_ == Phase::kEnded,
               "an append was begun and neither finished nor rolled back");
}

uint64_t HashRows(const LayerWrite& write) {
  const GroupShape& shape = write.sequence->groups[static_cast<size_t>(write.group)].exact->shape();
  uint64_t hash = 0;
  const auto add = [&](const TensorView& rows, int head_dim) {
    const size_t bytes = static_cast<size_t>(write.tokens) * static_cast<size_t>(shape.kv_heads) *
                         static_cast<size_t>(head_dim) * DataTypeBytes(rows.type);
    hash = XXH3_64bits_withSeed(rows.data, bytes, hash + static_cast<uint64_t>(rows.type));
  };
  add(write.k, shape.head_dim_k);
  add(write.v, shape.head_dim_v);
  return hash;
}

LayerWrite& WriteBatch::Add(const SequencePtr& sequence, int model_layer, int64_t start, int64_t tokens) {
  if (!Has(*sequence)) sequences.push_back(sequence);
  const LayerSpec& layer = sequence->model->spec.layers[static_cast<size_t>(model_layer)];
  LayerWrite& write = writes.emplace_back();
  write.sequence = sequence.get();
  write.group = layer.group;
  write.layer = layer.layer_in_group;
  write.model_layer = model_layer;
  write.start = start;
  write.tokens = tokens;
  return write;
}

bool WriteBatch::Has(const Sequence& sequence) const {
  return std::any_of(sequences.begin(), sequences.end(),
                     [&](const SequencePtr& each) { return each.get() == &sequence; });
}

}  // namespace kvtide
