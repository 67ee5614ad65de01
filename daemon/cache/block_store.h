// The BlockStore owns the tiers' memory and all blocks in them: it allocates, counts references and pins,
// keeps the order of eviction and the gauges per tier and pair. It copies nothing and decides nothing. It
// never grows: when a tier has no room, Allocate returns null. Not thread-safe; KvCache guards it.
//
// A tier index is an index into CacheOptions::tiers: 0 to homes() - 1 are the devices of the first tier, and
// what lies below any of them begins at homes().
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "daemon/cache/block.h"
#include "daemon/cache/cache_options.h"
#include "daemon/cache/extent_allocator.h"

namespace kvtide {

// Memory of one kind with the backend that attends there: one slab, taken at start.
struct Tier {
  std::string name, device;
  Backend* backend = nullptr;
  bool checksum = false;
  std::unique_ptr<Slab> slab;
  ExtentAllocator allocator{0};
  std::unique_ptr<EvictionPolicy> policy;  // holds exactly the blocks whose place is here
  absl::btree_map<size_t, Place*> places;  // by offset: every byte that is taken
  uint64_t blocks = 0;                     // places, retired ones included
  uint64_t pinned = 0;                     // of these
  std::vector<PairStats> pairs;            // by pair index
  uint64_t demoted = 0, promoted = 0, dropped = 0;
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
  Block* Allocate(int tier, int home, const BlockLayout* layout);
  // A place for a copy of the block in any tier, or null: anywhere, or at this offset.
  Place* Reserve(int tier, const Block& block);
  Place* ReserveAt(int tier, size_t offset, const Block& block);
  // Free bytes that nobody else may take until the place is retired, or null.
  Place* Claim(int tier, size_t offset, size_t bytes);

  void AddRef(Block* block, bool keeper);
  void Release(Block* block, bool keeper);
  void Hold(Block* block) { block->holds++; }
  void Unhold(Block* block);
  void Pin(Place* place);
  void Unpin(Place* place);

  // The block lies in `place` from now on; its former place is retired.
  void SwapPlace(Block* block, Place* place);
  // The bytes go, the block stays in its tables.
  void Drop(Block* block);
  void Retire(Place* place);

  void Touch(Block* block, absl::Time now);
  uint64_t serial() const { return serial_; }
  // Null if the block is no more.
  Block* Get(BlockId id) const {
    Block* block = blocks_[SlotOf(id)].get();
    return block != nullptr && block->id == id ? block : nullptr;
  }
  // Shows the blocks of a tier from the coldest on until `visit` says false.
  void Peek(int tier, absl::FunctionRef<bool(const Block&)> visit) const;
  static uint64_t TouchSerial(const Block& block) { return block.touch_serial; }
  static absl::Time LastTouched(const Block& block) { return block.last_touched; }
  // Attention read the block below the first tier: the mover may promote it. Beyond kMostWanted nobody is
  // remembered: whoever reads on wants it again.
  static constexpr size_t kMostWanted = 4096;
  void Want(Block* block);
  // Every wanted block once, in the order in which they were wanted; the list is empty then.
  std::vector<Block*> TakeWanted();

  // Nobody writes, moves or reads it.
  static bool IsIdle(const Block& block) {
    return block.place != nullptr && !block.writing && !block.moving && block.place->pins == 0;
  }
  uint64_t shared_blocks() const { return shared_; }
  uint64_t stored_bytes() const { return stored_bytes_; }
  template <class F>
  void ForEach(F f) const {
    for (const auto& block : blocks_)
      if (block != nullptr) f(*block);
  }
  void CheckInvariants() const;

 private:
  Place* NewPlace(int tier, size_t bytes, CachePair pair);
  Place* PlaceAt(int tier, size_t offset, size_t bytes, CachePair pair);
  void FreePlace(Place* place);
  void DeleteIfUnused(Block* block);

  std::deque<Tier> tiers_;
  int homes_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;  // by slot; null = free
  std::vector<BlockSlot> free_slots_;
  std::vector<uint32_t> uses_;   // of each slot
  std::vector<BlockId> wanted_;  // Block::wanted is set
  std::vector<Place*> retired_;  // waiting for their last pin
  uint64_t serial_ = 0;
  uint64_t shared_ = 0;        // blocks with refs > 1
  uint64_t stored_bytes_ = 0;  // of blocks' places
};

// Index of a pair in Tier::pairs.
inline size_t PairIndex(CachePair pair) {
  return static_cast<size_t>(pair.k) * static_cast<size_t>(kCacheTypes) + static_cast<size_t>(pair.v);
}

}  // namespace kvtide
