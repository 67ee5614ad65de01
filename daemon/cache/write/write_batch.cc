#include "daemon/cache/write/write_batch.h"

#ifdef KVTIDE_XXH_DISPATCH
#include <xxh_x86dispatch.h>  // the vector instructions of this processor; the same hash
#else
#include <xxhash.h>
#endif

#include <algorithm>

#include "kernels/base/check.h"

namespace kvtide {

WriteBatch::~WriteBatch() {
  KVTIDE_CHECK(phase_ == Phase::kNew || phase_ == Phase::kEnded,
               "an append was begun and neither finished nor rolled back");
  // One that was never begun.
  if (previous_ != nullptr) previous_->next_ = nullptr;
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

LayerWrite& WriteBatch::AddWrite(int model_layer, int64_t start, int64_t tokens) {
  Sequence& sequence = *sequences.back();
  const LayerSpec& layer = sequence.model->spec.layers[static_cast<size_t>(model_layer)];
  LayerWrite& write = writes.emplace_back();
  write.sequence = &sequence;
  write.follows = follows_.back();
  write.group = layer.group;
  write.layer = layer.layer_in_group;
  write.model_layer = model_layer;
  write.start = start;
  write.tokens = tokens;
  return write;
}

LayerWrite& WriteBatch::AddGroup(int group, int64_t start, int64_t tokens) {
  LayerWrite& write = writes.emplace_back();
  write.sequence = sequences.back().get();
  write.follows = follows_.back();
  write.whole_group = true;
  write.group = group;
  write.start = start;
  write.tokens = tokens;
  return write;
}

void WriteBatch::Follow(WriteBatch& previous) {
  KVTIDE_CHECK(phase_ == Phase::kNew && previous.open() && previous.next_ == nullptr);
  previous_ = &previous;
  previous.next_ = this;
}

bool WriteBatch::Writes(const Sequence& sequence) const {
  return std::any_of(sequences.begin(), sequences.end(),
                     [&](const SequencePtr& one) { return one.get() == &sequence; });
}

bool WriteBatch::Follows(const Sequence& sequence) const {
  for (size_t i = 0; i < sequences.size(); i++)
    if (sequences[i].get() == &sequence) return follows_[i];
  return false;
}

int64_t WriteBatch::EndOf(const Sequence& sequence) const {
  return std::find_if(writes.begin(), writes.end(),
                      [&](const LayerWrite& write) { return write.sequence == &sequence; })
      ->end();
}

}  // namespace kvtide
