// Sequences over a restart. Persist writes what a sequence has to the tier that survives one
// (TierOptions::index) and then its manifest; what it has acknowledged is there after a stop, a crash or a
// kill. The sequence goes on meanwhile: full blocks are copied first, and only the rest of it, at most a few
// blocks, keeps writers waiting.
//
// A copy that is up to date stays with its block (Block::backup), so that the next Persist writes what is
// new, and a demotion to that tier costs no write.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/block/block_guards.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/call/keyed_calls.h"
#include "daemon/cache/call/persist_report.h"
#include "daemon/cache/move/room_maker.h"
#include "daemon/cache/persist/manifest.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

// A manifest of a prefix that is to be written, and its blocks, whose places are kept.
struct KeptPrefix {
  std::string bytes;
  std::unique_ptr<PrefixRun> run;
};

class Persister {
 public:
  explicit Persister(CacheCore& core);
  ~Persister() { Stop(); }
  // Calls PersistChanged every persist_interval on a thread of its own, until Stop.
  void Start();
  void Stop();

  // Each of them in turn; the first error ends the call, what was acknowledged so far stays durable (the
  // report of a later call tells). FailedPrecondition without a tier that survives restarts, and for
  // sequences of evaluation mode; DataLoss where tokens were dropped; ResourceExhausted when the tier is
  // full.
  absl::StatusOr<PersistReport> Persist(std::span<const SequenceId> ids, const CallContext& context);
  // Those that want it with an Evict that names them.
  absl::Status PersistParked(std::span<const SequenceId> ids, const CallContext& context);
  // Those that want it always and have changed. Errors are counted.
  void PersistChanged();
  // Runs of prefixes (prefix_index.h) that are over.
  absl::Status EraseDeadRuns(CacheLock& lock);
  // Of a durable sequence that is about to be closed: what is found by its token ids afterwards and is
  // durable stays so. Null: nothing.
  std::unique_ptr<KeptPrefix> KeepPrefix(CacheState& state, const Sequence& sequence);
  // A closed sequence: it is not there after a restart; what was kept of it, as a prefix.
  absl::Status Forget(CacheLock& lock, Sequence& sequence, std::unique_ptr<KeptPrefix> kept = nullptr);
  // At the start: what is durable is there again.
  RestoreReport Restore();

  // Blocks that are found by key (keyed_persist.cc). All that are there when it begins.
  absl::StatusOr<NamespacePersistReport> PersistNamespace(NamespaceId id, const CallContext& context);
  // A deleted namespace: it is not there after a restart.
  absl::Status ForgetNamespace(KeyedNamespace& space);

 private:
  absl::Status PersistOne(CacheLock& lock, const SequencePtr& sequence, const CallContext& context,
                          PersistReport* report);
  absl::StatusOr<WriterGuard> BecomeWriter(CacheLock& lock, const SequencePtr& sequence,
                                           const CallContext& context);
  absl::Status WriteBackups(CacheLock& lock, const Sequence& sequence, bool all, const CallContext& context,
                            std::vector<PinnedPlace>* pins, PersistReport* report);
  void MakeDiskRoom(CacheLock& lock, const Sequence& sequence, std::span<const HeldBlock> blocks);
  absl::Status WriteBatch(CacheLock& lock, std::span<const HeldBlock> blocks, const CallContext& context,
                          std::vector<PinnedPlace>* pins, PersistReport* report);
  static std::vector<Block*> Fallen(const CacheState& state, const Sequence& sequence);
  // The place in the durable tier that holds what the block holds; null: none.
  Place* DurablePlace(const BlockStore& store, const Block& block) const;
  Manifest Describe(const CacheState& state, const Sequence& sequence, std::vector<Place*>* places) const;
  // The same without blocks.
  static Manifest DescribeEmpty(const CacheState& state, const Sequence& sequence);
  // A block to the end of its group.
  void AddBlock(const GroupTable& table, const Block& block, const Place* place, ManifestGroup* group) const;
  static int32_t AddProfile(const std::shared_ptr<const Profile>& profile, ManifestGroup* group);
  absl::Status RestoreOne(CacheLock& lock, const std::string& bytes, RestoreReport* report);
  absl::StatusOr<Manifest> Decode(const std::string& bytes);
  // A sequence as it was created, which is in no list yet.
  absl::StatusOr<SequencePtr> Rebuild(CacheLock& lock, const Manifest& manifest);
  // Blocks of a list or a run that came back, and have no recency yet.
  struct Returned {
    std::vector<Block*> blocks;
    BlockStore::End end = BlockStore::End::kHottest;  // where each joins those before it
    Priority priority = Priority::kNormal;
  };
  absl::Status RestoreRun(CacheLock& lock, const std::string& bytes, RestoreReport* report,
                          Returned* returned);
  Block* RestoreBlock(CacheLock& lock, const Manifest& manifest, size_t group, size_t at,
                      const Sequence& sequence, WritingBlock* guard);
  static absl::Status CheckCoding(const ManifestGroup& group, const GroupTable& table);
  absl::Status RestoreGroup(CacheLock& lock, const Manifest& manifest, size_t group, Sequence& sequence);
  void Release(CacheState& state, Durable* durable);
  // DurableIndex::Put; what is only cached makes way for it: the oldest runs of prefixes are forgotten.
  absl::Status Write(CacheLock& lock, uint64_t id, const std::string& bytes);
  // `why` if there is none, besides one.
  absl::Status LetOldestRunGo(CacheLock& lock, uint64_t besides, const absl::Status& why);
  // The durable index says now what is of this name: nothing is in doubt.
  void Settle(CacheState& state, SequenceId id);

  void Run();

  absl::Status PersistBlocks(CacheLock& lock, const NamespacePtr& space, std::vector<BlockId> ids,
                             const CallContext& context, NamespacePersistReport* report);
  // Writes what shards have gained, and at most `lost` of those that only have lost blocks.
  absl::Status WriteShards(CacheLock& lock, const NamespacePtr& space, size_t lost);
  void PersistNamespaces(CacheLock& lock);
  // Of a deleted namespace, and those that could not be erased before.
  absl::Status EraseShards(CacheLock& lock, std::span<const std::unique_ptr<KeyedShard>> shards);
  absl::Status RestoreShard(CacheLock& lock, uint64_t id, const std::string& bytes, RestoreReport* report,
                            Returned* returned);

  CacheCore& core_;
  RoomMaker room_;
  int tier_ = -1;  // that survives restarts; -1: none
  DurableIndex* index_ = nullptr;
  int64_t last_written_ = 0;  // of shards, under the cache's mutex: no two are of one time
  // Under the cache's mutex. What a failed call leaves: keys that may still be there at the next start, and
  // what their manifests name.
  std::vector<std::pair<SequenceId, std::vector<Place*>>> in_doubt_;
  std::vector<uint64_t> unerased_shards_;                        // of deleted namespaces, likewise
  std::map<uint64_t, std::shared_ptr<const Profile>> profiles_;  // of what was restored, by hash
  CondVar wake_;
  bool stopping_ = false;  // under the cache's mutex
  std::thread thread_;
};

}  // namespace kvtide
