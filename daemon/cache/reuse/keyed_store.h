// The block store: blocks without a sequence, found by key, for engines that keep pages of their own. Its
// blocks lie in the same tiers as those of sequences, in the first one below the devices that has room:
// nobody attends over them here. They are moved by the same policy, and may always be dropped.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/call/keyed_calls.h"
#include "daemon/cache/move/mover.h"
#include "daemon/cache/move/room_maker.h"
#include "daemon/cache/reuse/remote_exchange.h"
#include "daemon/cache/sequence/cache_core.h"
#include "daemon/cache/sequence/side_by_side.h"

namespace kvtide {

class KeyedStore {
 public:
  KeyedStore(CacheCore& core, Mover& mover, RemoteExchange& remote)
      : core_(core), mover_(mover), remote_(remote), room_(core) {}

  absl::StatusOr<NamespaceInfo> Open(const NamespaceSpec& spec, Persistence persistence, Priority priority);
  absl::StatusOr<StoreReport> Store(const StoreCall& call);
  absl::StatusOr<LookupReport> Lookup(const LookupCall& call);
  absl::StatusOr<LeaseInfo> DescribeLease(LeaseId lease, const CallContext& context);
  absl::StatusOr<LoadReport> Load(const LoadCall& call);
  // Of a load in place. False if they are unknown.
  bool ReleasePlaces(PlacesId places);
  // False if it was over already.
  bool Release(LeaseId lease, const CallContext& context);
  // Returns the namespace that was deleted, for what is durable of it; it had so many blocks.
  absl::StatusOr<NamespacePtr> Delete(NamespaceId id, const CallContext& context, uint64_t* blocks);
  absl::StatusOr<NamespaceInfo> Get(NamespaceId id, const CallContext& context);
  // Those of the caller's tenant.
  std::vector<NamespaceInfo> List(const CallContext& context);
  static NamespaceInfo Describe(const KeyedNamespace& space);
  // One that is not in use.
  static LeaseId NewLeaseId(CacheState& state);
  // A namespace that is there, or a new one.
  static absl::StatusOr<NamespacePtr> Make(CacheLock& lock, const NamespaceSpec& spec);

 private:
  struct Write;
  struct Storing;
  struct Read;
  class StoringLease;
  // What a client reads where it lies.
  struct Held {
    std::vector<PinnedPlace> places;
    uint64_t bytes = 0;
  };

  absl::StatusOr<KeyedLease*> FindLease(CacheLock& lock, LeaseId id, const CallContext& context);

  absl::StatusOr<std::vector<BlockKey>> Keys(NamespaceId space, std::span<const std::string_view> keys) const;
  // By which blocks of calls that follow each other go together: a record costs as much as a block.
  RecencyPtr NewestRecord(CacheState& state, KeyedNamespace& space, Priority priority) const;
  // The steps of a store: places for the next blocks that are not there, their bytes, their keys.
  absl::StatusOr<std::vector<Write>> Reserve(CacheLock& lock, Storing& storing);
  void CopyIn(CacheLock& lock, Storing& storing, std::span<Write> writes);
  absl::Status Enter(CacheLock& lock, Storing& storing, const StoringLease& lease, std::span<Write> writes);
  // Calls copy(i) for all i < count, without the mutex: on several threads if `side_by_side` and there are
  // bytes enough to be worth it. None begins after one has returned false.
  void Copies(size_t count, size_t bytes, bool side_by_side, const std::function<bool(size_t)>& copy);
  // A block in the best tier that is there; what is colder makes way.
  WritingBlock Allocate(CacheLock& lock, const KeyedNamespace& space, uint64_t want_bytes, bool* over_quota);
  // Drops the coldest block that is found by key: there is no room for more of them in the index.
  bool DropColdest(CacheState& state) const;
  void UseTogether(CacheState& state, std::span<Block* const> blocks) const;

  CacheCore& core_;
  Mover& mover_;
  RemoteExchange& remote_;
  RoomMaker room_;
  SideBySide copiers_;
  absl::flat_hash_map<PlacesId, Held> held_;  // guarded by the cache's mutex
};

}  // namespace kvtide
