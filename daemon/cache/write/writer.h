// Appends: reserve under the mutex, write without it, publish under it. Append does all of it for one
// sequence; AppendAttend takes the steps one by one, and its attention lets the backends write.
#pragma once

#include <span>
#include <string>

#include "absl/status/status.h"
#include "daemon/cache/call/sequence_calls.h"
#include "daemon/cache/move/mover.h"
#include "daemon/cache/sequence/cache_core.h"
#include "daemon/cache/write/sealer.h"
#include "daemon/cache/write/write_batch.h"

namespace kvtide {

class Writer {
 public:
  Writer(CacheCore& core, Mover& mover, Sealer& sealer) : core_(core), mover_(mover), sealer_(sealer) {}

  absl::Status Append(const AppendCall& call);
  // Whether new tokens for a layer are rows in a block that is there, is nobody else's and stays f16
  // afterwards.
  static bool IsPlain(const Sequence& sequence, const LayerSpec& layer, int64_t start, int64_t tokens);

  // Reserves everything; nothing has changed if it fails.
  absl::Status Begin(CacheLock& lock, WriteBatch& batch);
  // What backends write in one layer of a batch that is open: rows of `items`, one for each of its sequences,
  // at the places that it has reserved. `layer` is a new batch, which is never begun.
  void TakeLayer(CacheState& state, const WriteBatch& batch, int model_layer,
                 std::span<const AttendRequest> items, WriteBatch& layer) const;
  // Writes the rows, without the mutex; with seal_at_once codes them, too.
  absl::Status WriteBytes(WriteBatch& batch);
  // Shows the profiles that coding has made.
  void PublishProfiles(BlockStore& store, WriteBatch& batch);
  // Publishes profiles and the new lengths; the writes have their hashes. A failure has rolled the batch
  // back.
  absl::Status Commit(CacheState& state, WriteBatch& batch);
  // Takes back what the batch has reserved, after what follows it.
  void Rollback(CacheState& state, WriteBatch& batch);
  // Ends the batch; what follows an append (sealer.h) is done here.
  absl::Status Finish(CacheLock& lock, WriteBatch& batch);

 private:
  absl::Status CheckWanted(const CallContext* context) const;
  absl::Status CheckAppend(const AppendCall& call, const ModelSpec& model) const;
  absl::Status BeginLayer(CacheLock& lock, WriteBatch& batch, LayerWrite& write);
  void AddPiece(WriteBatch& batch, LayerWrite& write, int64_t index) const;
  absl::Status AddBlocks(CacheLock& lock, WriteBatch& batch, Sequence& sequence, int group,
                         int64_t last_index);
  absl::Status MakeWritable(CacheLock& lock, WriteBatch& batch, Sequence& sequence, int group, int64_t index);
  absl::Status CopyBeforeWrite(CacheLock& lock, WriteBatch& batch, Sequence& sequence, int group,
                               int64_t index, std::span<Block* const> entries);
  // The batch lets go of its blocks, then of its sequences, or hands them to what follows it.
  static void ReleaseBlocks(WriteBatch& batch);
  static void ReleaseSequences(WriteBatch& batch);
  void LearnTokens(CacheState& state, const LayerWrite& write) const;
  absl::Status CodeAtOnce(WriteBatch& batch, LayerWrite& write);

  CacheCore& core_;
  Mover& mover_;
  Sealer& sealer_;
};

}  // namespace kvtide
