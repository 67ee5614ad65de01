// The inside of KvCache. One mutex guards all metadata; a method marked "may unlock" gives it up while bytes
// are copied or coded, and the caller relies only on what it holds: a sequence's `writer` flag (nobody else
// changes its tables and lengths), holds on blocks, pins on places.
//
// Files: kv_cache.cc (models, sequences), kv_cache_append.cc, kv_cache_attend.cc, kv_cache_seal.cc (what
// follows an append), kv_cache_truncate.cc, kv_cache_moves.cc (room, eviction, mover), kv_cache_stats.cc.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "daemon/cache/block_store.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/cache/sequence.h"
#include "daemon/cache/side_by_side.h"
#include "kernels/base/mutex.h"

namespace kvtide {

class KvCache::Impl {
 public:
  explicit Impl(CacheOptions options);
  ~Impl();
  absl::Status Start();

  absl::StatusOr<ModelId> RegisterModel(const ModelSpec& spec);
  absl::StatusOr<ModelSpec> GetModel(ModelId model) const;
  absl::StatusOr<ModelId> FindModel(const std::string& name) const;
  absl::StatusOr<SequenceId> CreateSequence(ModelId model, const SequenceOptions& options);
  absl::StatusOr<SequenceId> ForkSequence(SequenceId id);
  absl::Status TruncateSequence(SequenceId id, int64_t tokens);
  absl::Status CloseSequence(SequenceId id);
  absl::Status Append(const AppendCall& call);
  absl::Status Attend(const AttendCall& call, bool append);
  absl::StatusOr<MoveReport> Evict(std::span<const SequenceId> sequences, int tier);
  absl::StatusOr<MoveReport> EvictAll(int tier);
  absl::StatusOr<MoveReport> Prefetch(std::span<const SequenceId> sequences);
  absl::StatusOr<SequenceInfo> GetSequence(SequenceId id) const;
  std::vector<SequenceInfo> ListSequences() const;
  absl::StatusOr<ModelId> ModelOf(SequenceId id) const;
  absl::StatusOr<int64_t> Length(SequenceId id) const;
  absl::StatusOr<int64_t> LayerLength(SequenceId id, int layer) const;
  CacheStats Stats() const;
  const CacheOptions& options() const { return options_; }
  MoveReport RunMovesOnce();
  void CheckInvariants() const;

 private:
  using SequencePtr = std::shared_ptr<Sequence>;

  // One block that a write goes to: its f16 block and, with seal_at_once, the coded twin in the same tier.
  struct Target {
    int64_t index = 0;
    int tier = 0;
    std::byte* exact = nullptr;
    std::byte* coded = nullptr;
  };
  // New tokens of one layer of one sequence.
  struct LayerWrite {
    Sequence* sequence = nullptr;
    int group = 0, layer = 0;  // layer within the group
    int model_layer = 0;
    int64_t start = 0, tokens = 0;
    TensorView k, v;
    bool repeated = false;  // the layer has these tokens already
    int64_t old_last_start = -1;
    std::vector<Target> targets;
  };
  // A running append: begun (reserved), written, committed; then settled, or rolled back. All sequences in it
  // have their `writer` flag set by it.
  struct WriteBatch {
    std::vector<SequencePtr> sequences;
    std::vector<LayerWrite> writes;
    std::vector<Block*> held;                                        // writing, with a hold
    std::vector<std::pair<GroupTable*, int64_t>> table_ends;         // before the batch
    std::vector<int64_t> old_tokens;                                 // of sequences
    std::map<GroupTable*, std::shared_ptr<const Profile>> profiles;  // seal_at_once: made while writing
    bool committed = false;
  };

  // Pins of one attend over several sequences; falls at scope end.
  class ReadPins {
   public:
    explicit ReadPins(Impl* impl) : impl_(impl) {}
    ~ReadPins();
    ReadPins(const ReadPins&) = delete;
    ReadPins& operator=(const ReadPins&) = delete;

   private:
    friend class Impl;
    Impl* impl_;
    std::vector<Place*> places_;
    std::vector<SequencePtr> sequences_;
  };
  struct TierPart;
  struct ItemPlan;

  struct CopyJob {
    int from = 0, to = 0;  // tiers
    const std::byte* source = nullptr;
    std::byte* target = nullptr;
    size_t bytes = 0;
    absl::Status status;
  };

  struct Counters {
    uint64_t sequences_created = 0, sequences_closed = 0, appended_tokens = 0, sealed_blocks = 0,
             failed_seals = 0;
    uint64_t copied_on_write_blocks = 0, window_freed_blocks = 0, evict_calls = 0, prefetch_calls = 0;
    uint64_t moves = 0, failed_moves = 0, moved_bytes = 0, dropped_blocks = 0;
    uint64_t attended_blocks = 0, attended_blocks_below_tier0 = 0, checksum_failures = 0, exhausted = 0;
  };

  // kv_cache.cc
  absl::StatusOr<SequencePtr> Find(SequenceId id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  SequenceId NewId() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The device of the first tier for a new sequence: the one with this name, or the one with the most room.
  absl::StatusOr<int> ChooseHome(const std::string& device) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Enter(const SequencePtr& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NotEmptyAnyMore(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  const BlockLayout* Layout(const GroupShape& shape, CachePair pair) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status BeginWriter(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndWriter(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReleaseTables(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // kv_cache_append.cc
  absl::Status BeginWrites(WriteBatch& batch)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);  // may unlock; all or nothing
  absl::Status BeginLayerWrite(WriteBatch& batch, LayerWrite& write) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status AddBlocks(WriteBatch& batch, Sequence& sequence, int group, int64_t last_index)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status MakeWritable(WriteBatch& batch, Sequence& sequence, int group, int64_t index)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartWriting(WriteBatch& batch, Block* block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Stamp(Block* block, const Sequence& sequence, int group, int64_t index)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status WriteBytes(WriteBatch& batch);  // without the lock
  absl::Status CodeAtOnce(WriteBatch& batch, LayerWrite& write);
  absl::Status Commit(WriteBatch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Rollback(WriteBatch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Finish(WriteBatch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);  // may unlock

  // kv_cache_attend.cc
  absl::Status CheckAttend(const AttendCall& call, const ModelSpec& model, bool append) const;
  absl::Status RunAttend(const AttendCall& call, const std::vector<SequencePtr>& sequences, bool own_writer);
  absl::Status PlanItem(const AttendCall& call, const AttendRequest& item, const SequencePtr& sequence,
                        bool own_writer, ItemPlan* plan, ReadPins* pins) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // kv_cache_seal.cc; the caller has the writer flag
  void Settle(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);  // may unlock
  bool MakeFirstBlockProfile(GroupTable& table) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FreeFallenBlocks(Sequence& sequence, GroupTable& table) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t SealRange(Sequence& sequence, int group, int64_t begin, int64_t end)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // kv_cache_truncate.cc
  absl::Status ReopenCodedBlock(Sequence& sequence, int group, int64_t index, int64_t tokens,
                                Block** reopened) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);  // may unlock

  // kv_cache_moves.cc
  // Blocks with a hold each, all in the fastest tier from `home` on that can take them; may unlock.
  // ResourceExhausted with the numbers. `want_bytes` is how much the caller will need in all: room is made in
  // larger steps.
  absl::Status AllocateTogether(int home, std::span<const BlockLayout* const> layouts, size_t want_bytes,
                                Block** blocks) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Block* AllocateIn(int tier, int home, const BlockLayout* layout, size_t want_bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Moves blocks out of the tier that were touched before `serial`; true if something moved. May unlock.
  bool MakeRoom(int tier, size_t bytes, size_t want_bytes, uint64_t before_serial)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Snapshot RoomSnapshot(int tier, size_t bytes, uint64_t before_serial) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  BlockView View(const Block& block, absl::Time now) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  MoveReport Execute(const std::vector<Move>& moves, bool pinned_too)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);  // may unlock
  // Blocks with a hold each (given back). Moves them to `tier`, making room there. May unlock.
  MoveReport MoveTo(const std::vector<Block*>& blocks, int tier, uint64_t before_serial)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<MoveReport> EvictLocked(const std::vector<SequencePtr>& sequences, int tier)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CopyAll(std::span<CopyJob> jobs) const;                           // without the lock
  absl::Status CopyOne(CopyJob job) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);  // unlocks
  std::string RoomText(size_t bytes) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Unlocks while the block moves, for room_wait at most: then Aborted.
  absl::Status WaitUntilStill(const Block* block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RunMover();

  // kv_cache_stats.cc
  SequenceInfo Describe(const Sequence& sequence) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const CacheOptions options_;
  mutable Mutex mu_;
  CondVar changed_;     // a move ended, pins fell, blocks were freed
  CondVar mover_wake_;  // the cache stops
  BlockStore store_ ABSL_GUARDED_BY(mu_);
  std::vector<Backend*> backends_;  // by tier; fixed after Start
  std::vector<std::shared_ptr<const ModelState>> models_ ABSL_GUARDED_BY(mu_);
  std::map<SequenceId, SequencePtr> sequences_ ABSL_GUARDED_BY(mu_);
  struct HomeCount {
    size_t sequences = 0, empty = 0;
  };
  std::vector<HomeCount> home_counts_ ABSL_GUARDED_BY(mu_);  // of open sequences, by device of the first tier
  int dropping_sequences_ ABSL_GUARDED_BY(mu_) = 0;          // open ones with allow_drop
  int closing_ ABSL_GUARDED_BY(mu_) = 0;                     // closed sequences whose writer still runs
  std::deque<SequenceId> closed_ ABSL_GUARDED_BY(mu_);       // the latest ones, for better messages
  std::vector<std::unique_ptr<const BlockLayout>> layouts_ ABSL_GUARDED_BY(mu_);
  std::mt19937_64 ids_ ABSL_GUARDED_BY(mu_);
  std::vector<BlockId> wanted_
      ABSL_GUARDED_BY(mu_);  // Block::wanted is set; entries of deleted blocks are skipped
  int moves_running_ ABSL_GUARDED_BY(mu_) = 0;
  int attends_running_ ABSL_GUARDED_BY(mu_) = 0;
  Counters counters_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  SideBySide machines_;  // of an attention
  std::thread mover_;
};

}  // namespace kvtide
