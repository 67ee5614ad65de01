// The index of blocks that are found by key: namespaces, their blocks, and the leases of clients that are
// about to load some. Such a block belongs to no sequence; the index has one reference to it, which allows
// drops, and lets it go when it is dropped. Guarded by the cache's mutex (it is part of CacheState).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/cache/block/block_guards.h"
#include "daemon/cache/block/blocks_by_key.h"
#include "daemon/cache/call/identity.h"
#include "daemon/cache/call/name_space.h"
#include "daemon/cache/call/sequence_options.h"

namespace kvtide {

// Durable blocks that one value of the durable index names.
struct KeyedShard {
  uint64_t id = 0;              // in the durable index
  std::vector<BlockId> blocks;  // some may be no more
  bool gained = false;          // it names blocks that its value does not name yet,
  bool lost = false;            // or the value names some that are no more
};

struct KeyedNamespace {
  explicit KeyedNamespace(const BlockStore* store) : blocks(store) {}

  NamespaceId id = 0;
  NamespaceSpec spec;
  std::shared_ptr<TenantAccount> account;  // of the spec's tenant, where its blocks count
  BlockForm form = BlockForm::Opaque(0);
  const BlockLayout* exact = nullptr;  // the same rows in f16; null: opaque
  const Ladder* ladder = nullptr;      // what its blocks may be recoded as; null: nothing
  Persistence persistence = Persistence::kNone;
  Priority priority = Priority::kNormal;  // of what is stored without one
  bool deleted = false;
  BlocksByKey blocks;
  uint64_t degraded = 0;                       // of these
  std::array<RecencyPtr, kPriorities> newest;  // of what was stored last, by priority
  uint64_t leases = 0;
  // For the durable tier.
  std::vector<std::unique_ptr<KeyedShard>> shards;
  absl::flat_hash_map<BlockId, KeyedShard*> durable;  // which shard names it
  std::vector<BlockId> fresh;                         // with kAll: stored since it was last made durable
  bool persisting = false;
  // Counters.
  uint64_t hits = 0, misses = 0, stored = 0, present = 0, loaded = 0, dropped = 0;

  // Of the namespace's form, or of a rung below it.
  bool Has(const Block& block) const {
    return block.layout() == form.layout ? block.bytes() == form.bytes
                                         : ladder != nullptr && ladder->Has(block.layout());
  }
};
using NamespacePtr = std::shared_ptr<KeyedNamespace>;

struct PrefixSpace;

// What a lookup of a prefix has found (prefix_reuse.h).
struct PrefixHold {
  std::shared_ptr<PrefixSpace> space;
  std::vector<BlockKey> keys;  // of its blocks
  std::string tenant;
};

// Of blocks of a namespace, or of a prefix.
struct KeyedLease {
  NamespacePtr space;                        // null: of a prefix
  std::shared_ptr<const PrefixHold> prefix;  // null: of a namespace
  absl::Time end;
  const std::string& tenant() const { return space != nullptr ? space->spec.tenant : prefix->tenant; }
  std::vector<HeldBlock> blocks;  // each counted in Block::leases
};

class KeyedIndex {
 public:
  explicit KeyedIndex(BlockStore* store);

  // NotFound for one that is unknown, was deleted, or is another tenant's.
  absl::StatusOr<NamespacePtr> Find(NamespaceId id, const Identity& caller) const;
  const std::map<NamespaceId, NamespacePtr>& namespaces() const { return namespaces_; }
  void Enter(const NamespacePtr& space);
  // kAll: what is not durable yet is to become so.
  void SetPersistence(KeyedNamespace& space, Persistence persistence);
  // Blocks that have the former one get it, too.
  void SetPriority(KeyedNamespace& space, Priority priority);
  // Its blocks and leases go; those who hold it see `deleted`. Returns how many blocks it had.
  uint64_t Delete(const NamespacePtr& space);

  // A new block, which nobody else has: found from now on. It is of the namespace's form, or of a rung of its
  // ladder.
  void Insert(KeyedNamespace& space, const BlockKey& key, Block* block);
  uint64_t blocks() const { return blocks_; }
  uint64_t bytes() const { return bytes_; }  // that they take

  void Grant(LeaseId id, const NamespacePtr& space, absl::Time end, std::vector<HeldBlock> blocks);
  void Grant(LeaseId id, std::shared_ptr<const PrefixHold> prefix, absl::Time end,
             std::vector<HeldBlock> blocks);
  // Null if it is unknown or over.
  KeyedLease* FindLease(LeaseId id);
  bool Release(LeaseId id);
  // Ends those whose time is over; returns how many.
  uint64_t ExpireLeases(absl::Time now);
  uint64_t leases() const { return leases_.size(); }
  uint64_t expired() const { return expired_; }

  // Blocks and references of all namespaces.
  template <class F>
  void ForEach(F f) const {
    for (const auto& entry : namespaces_) {
      const auto& space = *entry.second;
      space.blocks.ForEach([&](Block* block) { f(space, block->key, block); });
    }
  }
  void CheckInvariants() const;
  // Gives everything back. No call may be running.
  void Clear();

 private:
  // A block that is about to be dropped is not found any more.
  void Forget(Block* block);
  // It was of another form before, of so many bytes.
  void Recoded(const Block& block, const BlockKind& before);
  // It need not be there after a restart.
  void ForgetDurable(KeyedNamespace& space, Block* block);
  void Enter(LeaseId id, KeyedLease lease);
  void End(std::map<LeaseId, KeyedLease>::iterator lease);

  BlockStore* const store_;
  std::map<NamespaceId, NamespacePtr> namespaces_;
  std::map<LeaseId, KeyedLease> leases_;
  std::set<std::pair<absl::Time, LeaseId>> ends_;
  uint64_t blocks_ = 0, bytes_ = 0, expired_ = 0;
};

// The place of a durable block that is kept for it, in this tier.
Place* KeptPlace(const BlockStore& store, const Block& block);

BlockKey HashKey(NamespaceId space, std::string_view key);

}  // namespace kvtide
