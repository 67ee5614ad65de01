// The BlockStore owns the tiers' memory and all blocks in them: it allocates, counts references and pins,
// keeps the order of eviction, what chunks and recency records count, and the gauges per tier and pair. It
// copies nothing and decides nothing. It never grows: when a tier has no room, Allocate returns null. Not
// thread-safe; KvCache guards it.
//
// A tier index is an index into CacheOptions::tiers: 0 to homes() - 1 are the devices of the first tier, and
// what lies below any of them begins at homes().
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/container/node_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "daemon/cache/block/block.h"
#include "daemon/cache/block/slots.h"
#include "daemon/cache/call/cache_options.h"
#include "daemon/cache/tier/extent_allocator.h"
#include "daemon/cache/tier/ghost_keys.h"
#include "daemon/cache/tier/priority_order.h"

namespace kvtide {

// Memory of one kind with the backend that attends there: one slab, taken at start. Or what is reached by
// I/O.
struct Tier {
  std::string name, device;
  Backend* backend = nullptr;
  IoTier* io = nullptr;
  bool checksum = false;
  std::unique_ptr<Slab> slab;  // null with I/O
  bool attends() const { return backend != nullptr; }
  // What a block takes.
  size_t ExtentBytes(size_t bytes) const { return io != nullptr ? io->ExtentBytes(bytes) : bytes; }
  // The largest block that fits into the largest free extent.
  size_t LargestRoom() const;
  ExtentAllocator allocator{0};
  std::unique_ptr<PriorityOrder> policy;   // holds exactly the records that have blocks here
  absl::btree_map<size_t, Place*> places;  // by offset: every byte that is taken
  uint64_t blocks = 0;                     // places, retired ones included
  uint64_t pinned = 0;                     // of these, those that copies work on
  uint64_t read = 0;                       // blocks of records that are being read
  std::vector<PairStats> pairs;            // by pair index
  uint64_t demoted = 0, promoted = 0, dropped = 0, lost = 0;
  uint64_t degraded = 0, degraded_bytes = 0;  // recoded here, and what that has freed
  uint64_t prefix_hit_tokens = 0;
};

class BlockStore {
 public:
  BlockStore() = default;
  ~BlockStore();
  BlockStore(const BlockStore&) = delete;
  BlockStore& operator=(const BlockStore&) = delete;
  absl::Status Init(const CacheOptions& options);

  size_t tiers() const { return tiers_.size(); }
  Tier& tier(int index) { return tiers_[static_cast<size_t>(index)]; }
  const Tier& tier(int index) const { return tiers_[static_cast<size_t>(index)]; }

  int homes() const { return homes_; }
  // The next lower tier; tiers() where there is none.
  int Below(int tier) const { return tier < homes_ ? homes_ : tier + 1; }
  bool HasBelow(int tier) const { return Below(tier) < static_cast<int>(tiers()); }

  // A block that nobody has yet (make it a WritingBlock at once), or null. f16 blocks come from the top of
  // the slab, others from the bottom. `tier` is `home` or below it.
  Block* Allocate(int tier, int home, const BlockForm& form);
  // The same for a block whose bytes lie at this offset already, in a tier of I/O; null if one of them is
  // taken.
  Block* AllocateAt(int tier, size_t offset, int home, const BlockForm& form);
  // Bytes that the tenant may still take in the tier, over all its devices.
  uint64_t QuotaLeft(const TenantAccount& account, int tier) const;
  // Whether the quota of the block's tenant allows a copy of it in the tier.
  bool MayLie(const Block& block, int tier) const;
  // A place for a copy of the block in any tier, or null: anywhere (within its tenant's quota), or at this
  // offset.
  Place* Reserve(int tier, const Block& block);
  Place* ReserveAt(int tier, size_t offset, const Block& block);
  // The same in the block's own tier, for its bytes in another form.
  Place* ReserveAs(const BlockForm& form, const Block& block);
  // Free bytes that nobody else may take until the place is retired, or null.
  Place* Claim(int tier, size_t offset, size_t bytes);
  // Where the place's bytes are, perhaps a device pointer; null in a tier of I/O. Without the mutex too.
  std::byte* Data(const Place& place) const {
    const Slab* const slab = tier(place.tier).slab.get();
    return slab != nullptr ? slab->data() + place.offset : nullptr;
  }
  // That lies there; null: reserved by a move, or retired.
  Block* BlockAt(const Place& place) { return place.retired ? nullptr : At(place.block); }
  const Block* BlockAt(const Place& place) const { return place.retired ? nullptr : At(place.block); }

  // What the block has in common with others.
  void SetKind(Block* block, const BlockKind& kind);
  void SetProfile(Block* block, std::shared_ptr<const Profile> profile);
  // Its place is counted for the tenant, if none was so far.
  void SetAccount(Block* block, std::shared_ptr<TenantAccount> account);
  size_t kinds() const { return kinds_.size(); }

  // Chunks (block_table.h). A new one has one owner.
  Chunk* NewChunk(TableFamily* family, bool keeper);
  void AddOwner(Chunk* chunk, bool keeper);
  void RemoveOwner(Chunk* chunk, bool keeper);  // the last one frees it
  void Enter(Block* block, Chunk* chunk, int slot);
  void Leave(Chunk* chunk, int slot);
  // Entries in no chunk: twins of seal_at_once.
  void AddDirect(Block* block, bool keeper);
  void RemoveDirect(Block* block, bool keeper);
  void Hold(Block* block) { block->holds++; }
  void Unhold(Block* block);
  // After the index of prefixes has let it go.
  void DeleteIfUnused(Block* block);
  void Pin(Place* place);
  void Unpin(Place* place);
  void LeavePicture(Place* place);
  // For manifests.
  void Keep(Place* place) { place->Written().keeps++; }
  void Unkeep(Place* place);

  // The place, which no block has, holds what the block holds; it lives while it is pinned or kept.
  void SetBackup(Block* block, Place* place);
  Place* Backup(const Block& block) const {  // null: it has none
    return block.has_backup ? backups_.at(SlotOf(block.id)) : nullptr;
  }
  // The block is about to change.
  void ForgetBackup(Block* block);
  // The block lies in its backup from now on.
  void MoveToBackup(Block* block);

  // The block lies in `place` from now on; its former place is retired.
  void SwapPlace(Block* block, Place* place);
  // The same with its bytes recoded on the way, within its tier.
  void SwapForm(Block* block, Place* place, const BlockLayout* layout);
  // The bytes go, the block stays in its tables; one that is found by key is not found any more.
  void Drop(Block* block);
  // Called with every block that is found by key before it is dropped: it leaves the index.
  void SetForget(std::function<void(Block*)> forget) { forget_ = std::move(forget); }
  // Called with every block that is found by key after it was recoded, and what it was before.
  void SetRecoded(std::function<void(const Block&, const BlockKind&)> recoded) {
    recoded_ = std::move(recoded);
  }
  // As SetForget for blocks of prefixes.
  void SetForgetPrefix(std::function<void(Block*)> forget) { forget_prefix_ = std::move(forget); }
  // A block of a prefix that no table has came to the index, or leaves it.
  void CountAlone(const Block& block, int sign);
  void Retire(Place* place);

  // Recency (recency.h).
  RecencyPtr NewRecency(absl::Time now, Standing standing = Standing::kUsed,
                        Priority priority = Priority::kNormal);
  // Nobody has its blocks open any more: they are cached, and new as that.
  void MakeNew(const RecencyPtr& record);
  // Whether the block that is cached under this key now is one that was dropped not long ago, before anybody
  // had asked for it; that is forgotten then. Never with LRU.
  bool TakeGhost(const BlockKey& key, int group = 0) { return ghosts_.Take(GhostOf(key, group)); }
  // Puts a block that has no record yet into this one: as its hottest block in the tier, or as its coldest.
  enum class End : uint8_t { kHottest, kColdest };
  void Join(Block* block, const RecencyPtr& record, End end = End::kHottest);
  // The same for one that may have another record.
  void Rejoin(Block* block, const RecencyPtr& record, End end);
  void Touch(const RecencyPtr& record, absl::Time now) { TouchRecord(Root(record), now); }
  // Of the blocks that go by the record from now on, and of those that do already.
  void SetPriority(const RecencyPtr& record, Priority priority);
  // Whoever shares the record has this priority: it has no lower one.
  void RaisePriority(const RecencyPtr& record, Priority priority) {
    if (record != nullptr && Root(record)->priority < priority) SetPriority(record, priority);
  }
  // kNormal for a block without a record.
  Priority PriorityOf(const Block& block) const {
    return block.record != kNoSlot ? Root(block).priority : Priority::kNormal;
  }
  Priority PriorityOf(const RecencyPtr& record) const { return Root(record)->priority; }
  // Blocks that go by the record.
  uint64_t BlocksOf(const RecencyPtr& record) const;
  bool GoesBy(const Block& block, const RecencyPtr& record) const {
    return block.record != kNoSlot && &Root(block) == Root(record.get());
  }
  // Null: none.
  RecencyPtr RecordOf(const Block& block) const {
    return block.record != kNoSlot ? records_[block.record]->self : nullptr;
  }
  // What is there so far goes by the family's record from now on; parent and child have records of their own
  // for what comes.
  void ForkRecency(SequenceRecency* parent, SequenceRecency* child);
  void Touch(const SequenceRecency& sequence, absl::Time now);
  // The record that the block goes by.
  void Touch(const Block& block, absl::Time now);
  void BeginRead(const RecencyPtr& record);
  void EndRead(const RecencyPtr& record);
  // PeekIdle passes over its blocks while it is pinned.
  void SetPinned(const RecencyPtr& record, bool pinned) { Root(record)->pinned = pinned; }
  uint64_t serial() const { return serial_; }
  uint64_t TouchSerial(const Block& block) const { return Root(block).touch_serial; }
  absl::Time LastTouched(const Block& block) const { return Root(block).last_touched; }
  absl::Time LastTouched(const RecencyPtr& record) const { return Root(record.get())->last_touched; }
  // Shows the blocks of a tier from the coldest on until `visit` says false.
  void Peek(int tier, absl::FunctionRef<bool(const Block&)> visit) const;
  // The same without the blocks of sequences that are being read, are pinned or were used at `before_serial`
  // or later.
  void PeekIdle(int tier, uint64_t before_serial, absl::FunctionRef<bool(const Block&)> visit) const;
  // Attention has found blocks of the sequence below the first tier: the mover may promote them.
  void Want(const SequenceRecency& sequence);
  void Unwant(const SequenceRecency& sequence);
  // At most `limit` blocks below the first tier of what is wanted, in the order in which it was, but a
  // tenant's higher priorities first in its turns; nothing is wanted then.
  std::vector<Block*> TakeWanted(size_t limit);

  // Null if the block is no more.
  Block* Get(BlockId id) const {
    Block& block = blocks_[SlotOf(id)];
    return block.kind != nullptr && block.id == id ? &block : nullptr;
  }
  // By the lower half of its id; null: kNoSlot.
  Block* At(uint32_t slot) const { return slot != kNoSlot ? &blocks_[slot] : nullptr; }
  // Found by key or as a prefix, and in no table.
  static bool IsCachedOnly(const Block& block) {
    return (block.keyed || block.prefix() != nullptr) && block.chunks.empty();
  }
  // Nobody writes, moves or reads it.
  bool IsIdle(const Block& block) const {
    return block.place != nullptr && !block.writing && !block.moving && block.place->pins == 0 &&
           (block.record == kNoSlot || Root(block).readers == 0);
  }
  uint64_t shared_blocks() const { return shared_; }
  uint64_t dropped_blocks() const { return dropped_; }
  uint64_t stored_bytes() const { return stored_bytes_; }
  // Blocks that may be recoded to fewer bits, those without bytes included.
  uint64_t recodable_blocks() const { return recodable_; }
  uint64_t alone_bytes() const { return alone_bytes_; }  // of blocks of prefixes that no table has
  // Chunks, pictures and snapshots.
  uint64_t table_bytes() const { return static_cast<uint64_t>(table_bytes_); }
  void CountTableBytes(int64_t bytes) { table_bytes_ += bytes; }
  uint64_t NextSnapshotSerial() { return ++snapshot_serial_; }
  template <class F>
  void ForEach(F f) const {
    for (uint32_t slot = 0; slot < blocks_.size(); slot++)
      if (blocks_[slot].kind != nullptr) f(static_cast<const Block&>(blocks_[slot]));
  }
  void CheckInvariants() const;

 private:
  const Recency& Root(const Block& block) const { return *Root(records_[block.record]); }
  Recency* RootOf(const Block& block) const { return const_cast<Recency*>(&Root(block)); }
  static const Recency* Root(const Recency* record) {
    return record->merged_into != nullptr ? record->merged_into.get() : record;
  }
  static Recency* Root(const RecencyPtr& record) {
    return record->merged_into != nullptr ? record->merged_into.get() : record.get();
  }

  // A key of each layer group.
  static BlockKey GhostOf(const BlockKey& key, int group) {
    return {key.low + static_cast<uint64_t>(group) * 0x9e3779b97f4a7c15, key.high};
  }
  Place* NewPlace(int tier, size_t bytes, size_t pair_index);
  Place* PlaceAt(int tier, size_t offset, size_t bytes, size_t pair_index);
  Block* NewBlock(Place* place, int home, const BlockForm& form);
  void FreeIfUnused(Place* place);
  void LeaveKind(Block* block);
  // What snapshots show of the block is stale.
  void MakeStale(const Block& block);
  // In and out of the list of its record and tier.
  void Link(Block* block, End end);
  void Unlink(Block* block);
  void TouchRecord(Recency* root, absl::Time now);
  void Merge(const RecencyPtr& from, const RecencyPtr& into);
  // Adds the entries' block to, or takes it from, the counts of the chunks that have it.
  void CountInChunks(const Block& block, int sign);
  void CheckChunk(const Chunk& chunk) const;
  void CountShared(const Block& block, int references_before);

  std::deque<Tier> tiers_;
  int homes_ = 0;
  Slots<Block> blocks_;  // without a kind: free; its id is that of the next one there
  Slots<Place> places_;
  absl::node_hash_set<BlockKind> kinds_;
  absl::flat_hash_set<Place*> retired_;
  absl::flat_hash_map<uint32_t, Place*> backups_;  // by slot of the block
  std::vector<Recency*> records_;                  // by slot; null = free
  std::vector<RecordSlot> free_records_;
  std::vector<std::weak_ptr<Recency>> wanted_;  // Recency::wanted is set
  GhostKeys ghosts_;                            // without any: LRU
  uint64_t serial_ = 0;
  uint64_t snapshot_serial_ = 0;
  uint64_t shared_ = 0;        // blocks with several references
  uint64_t dropped_ = 0;       // blocks in tables without bytes
  uint64_t stored_bytes_ = 0;  // of blocks' places
  uint64_t alone_bytes_ = 0;
  uint64_t recodable_ = 0;
  int64_t table_bytes_ = 0;
  std::function<void(Block*)> forget_, forget_prefix_;
  std::function<void(const Block&, const BlockKind&)> recoded_;
};

}  // namespace kvtide
