// A KvStore that shows every q, k and v to a visitor on their way into another store: how measurements see
// what the cache sees. The other store is borrowed.
#pragma once

#include <functional>
#include <utility>

#include "clients/engine/kv_store.h"

namespace kvtide::engine {

class CaptureKvStore : public KvStore {
 public:
  // (layer, start position, tokens, q, k, v), shapes as in AppendAttend.
  using Visitor = std::function<void(int, int64_t, int, const float*, const float*, const float*)>;
  CaptureKvStore(KvStore& store, Visitor visitor) : store_(store), visitor_(std::move(visitor)) {}

  const KvGeometry& geometry() const override { return store_.geometry(); }
  absl::StatusOr<SequenceId> CreateSequence() override { return store_.CreateSequence(); }
  absl::Status AppendAttend(SequenceId sequence, int layer, int64_t start, int n_tokens, const float* q,
                            const float* k, const float* v, float* out) override {
    visitor_(layer, start, n_tokens, q, k, v);
    return store_.AppendAttend(sequence, layer, start, n_tokens, q, k, v, out);
  }
  absl::StatusOr<SequenceId> Fork(SequenceId sequence) override { return store_.Fork(sequence); }
  absl::Status Truncate(SequenceId sequence, int64_t length) override {
    return store_.Truncate(sequence, length);
  }
  absl::Status Close(SequenceId sequence) override { return store_.Close(sequence); }

 private:
  KvStore& store_;
  Visitor visitor_;
};

}  // namespace kvtide::engine
