// Appends: reserve under the mutex, write without it, publish under it. Append does all of it for one
// sequence; AppendAttend takes the steps one by one, with its attention before Finish.
#pragma once

#include <span>
#include <string>

#include "absl/status/status.h"
#include "daemon/cache/cache_core.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/cache/mover.h"
#include "daemon/cache/sealer.h"
#include "daemon/cache/write_batch.h"

namespace kvtide {

class Writer {
 public:
  Writer(CacheCore& core, Mover& mover, Sealer& sealer) : core_(core), mover_(mover), sealer_(sealer) {}

  absl::Status Append(const AppendCall& call);

  // Reserves everything; nothing has changed if it fails.
  absl::Status Begin(CacheLock& lock, WriteBatch& batch);
  // Writes the rows, without the mutex.
  absl::Status WriteBytes(WriteBatch& batch);
  // Publishes the new lengths. A failure has rolled the batch back.
  absl::Status Commit(CacheState& state, WriteBatch& batch);
  // Takes back what the batch has done, in lengths and in blocks.
  void Rollback(CacheState& state, WriteBatch& batch);
  // Ends the batch; what follows an append (sealer.h) is done here.
  absl::Status Finish(CacheLock& lock, WriteBatch& batch);

 private:
  absl::Status CheckAppend(const AppendCall& call, const ModelSpec& model) const;
  absl::Status BeginLayer(CacheLock& lock, WriteBatch& batch, LayerWrite& write);
  absl::Status AddBlocks(CacheLock& lock, WriteBatch& batch, Sequence& sequence, int group,
                         int64_t last_index);
  absl::Status MakeWritable(CacheLock& lock, WriteBatch& batch, Sequence& sequence, int group, int64_t index);
  absl::Status CopyBeforeWrite(CacheLock& lock, WriteBatch& batch, Sequence& sequence, int group,
                               int64_t index, std::span<Block* const> entries);
  absl::Status CodeAtOnce(WriteBatch& batch, LayerWrite& write);

  CacheCore& core_;
  Mover& mover_;
  Sealer& sealer_;
};

}  // namespace kvtide
