// A KvStore in the memory of this process: keys and values in f16 or f32 pages of 64 tokens, nothing
// compressed, nothing moved. It is what the daemon is compared with, so it rounds to f16 exactly as the
// daemon's f16 type does. Pages are shared between forks and copied when one of them is written.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include "clients/engine/kv_store.h"
#include "kernels/base/data_type.h"
#include "kernels/base/thread_pool.h"

namespace kvtide::engine {

class LocalKvStore : public KvStore {
 public:
  // `storage` is kF16 or kF32. The pool is borrowed and must outlive the store.
  LocalKvStore(const KvGeometry& geometry, DataType storage, ThreadPool& pool);

  const KvGeometry& geometry() const override { return geometry_; }
  absl::StatusOr<SequenceId> CreateSequence() override;
  absl::Status AppendAttend(SequenceId sequence, int layer, int64_t start, int n_tokens, const float* q,
                            const float* k, const float* v, float* out) override;
  absl::StatusOr<SequenceId> Fork(SequenceId sequence) override;
  absl::Status Truncate(SequenceId sequence, int64_t length) override;
  absl::Status Close(SequenceId sequence) override;

 private:
  // K and V of 64 tokens in one layer, all KV heads. Per head: K as two panels of 32 tokens, each
  // [head_dim][32]; V as panels of 32 channels, each [64 tokens][32].
  using Page = std::vector<std::byte>;
  struct Layer {
    std::vector<std::shared_ptr<Page>> pages;
    int64_t length = 0;
  };
  struct Sequence {
    std::vector<Layer> layers;
  };

  absl::StatusOr<Sequence*> Find(SequenceId sequence);
  void Append(Layer& layer, int n_tokens, const float* k, const float* v);
  void WriteToken(Page& page, int slot, const float* k, const float* v) const;
  void Store(Page& page, size_t index, float value) const;
  void AttendBlock(const Layer& layer, int window, int kv_head, int64_t first_position, int n_tokens,
                   const float* q, float* out) const;
  size_t HeadElements() const;
  const std::byte* KeyPanel(const Page& page, int kv_head, int panel) const;
  const std::byte* ValuePanel(const Page& page, int kv_head, int panel) const;

  const KvGeometry geometry_;
  const DataType storage_;
  const int value_panels_;  // head_dim rounded up to panels
  ThreadPool& pool_;
  std::map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 1;
};

}  // namespace kvtide::engine
