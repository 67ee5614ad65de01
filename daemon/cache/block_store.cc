#include "daemon/cache/block_store.h"

#include <algorithm>

#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {

BlockStore::~BlockStore() {
  for (const auto& block : blocks_)
    if (block != nullptr) delete block->place;
  for (Place* place : retired_) delete place;
}

absl::Status BlockStore::Init(const CacheOptions& options) {
  homes_ = CountHomes(options.tiers);
  for (const TierOptions& from : options.tiers) {
    Tier& tier = tiers_.emplace_back();
    tier.name = from.name;
    tier.device = from.Device();
    tier.backend = from.backend;
    tier.checksum = from.checksum;
    tier.allocator = ExtentAllocator(from.capacity_bytes);
    tier.policy = MakeLruPolicy();
    tier.pairs.resize(static_cast<size_t>(kCacheTypes) * static_cast<size_t>(kCacheTypes));
    absl::StatusOr<std::unique_ptr<Slab>> slab = from.backend->AllocateSlab(tier.allocator.capacity_bytes());
    if (!slab.ok())
      return Annotate(slab.status(), absl::StrCat("tier '", from.name, "' of ", from.capacity_bytes,
                                                  " bytes on ", tier.device));
    tier.slab = std::move(slab).value();
  }
  return absl::OkStatus();
}

Place* BlockStore::NewPlace(int tier_index, size_t bytes, CachePair pair) {
  Tier& tier = this->tier(tier_index);
  const auto end = pair == ExactPair() ? ExtentAllocator::End::kTop : ExtentAllocator::End::kBottom;
  const std::optional<size_t> offset = tier.allocator.Allocate(bytes, end);
  return offset.has_value() ? PlaceAt(tier_index, *offset, bytes, pair) : nullptr;
}

// The bytes are allocated.
Place* BlockStore::PlaceAt(int tier_index, size_t offset, size_t bytes, CachePair pair) {
  Tier& tier = this->tier(tier_index);
  auto place = std::make_unique<Place>();
  place->tier = tier_index;
  place->offset = offset;
  place->bytes = bytes;
  place->data = tier.slab->data() + offset;
  place->pair = pair;
  tier.places[offset] = place.get();
  tier.blocks++;
  PairStats& stats = tier.pairs[PairIndex(pair)];
  stats.blocks++;
  stats.bytes += bytes;
  return place.release();
}

void BlockStore::FreePlace(Place* place) {
  KVTIDE_CHECK(place->pins == 0);
  Tier& tier = this->tier(place->tier);
  tier.allocator.Free(place->offset, place->bytes);
  tier.places.erase(place->offset);
  tier.blocks--;
  PairStats& stats = tier.pairs[PairIndex(place->pair)];
  KVTIDE_CHECK(stats.blocks > 0 && stats.bytes >= place->bytes);
  stats.blocks--;
  stats.bytes -= place->bytes;
  delete place;
}

Block* BlockStore::Allocate(int tier, int home, const BlockLayout* layout) {
  KVTIDE_CHECK(tier == home || tier >= homes_);
  Place* place = NewPlace(tier, layout->block_bytes(), layout->pair());
  if (place == nullptr) return nullptr;
  BlockSlot slot;
  if (free_slots_.empty()) {
    slot = static_cast<BlockSlot>(blocks_.size());
    blocks_.emplace_back();
    uses_.push_back(0);
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  blocks_[slot] = std::make_unique<Block>();
  Block* block = blocks_[slot].get();
  block->id = BlockId{uses_[slot]++} << 32 | slot;
  block->layout = layout;
  block->place = place;
  place->block = block;
  block->home = home;
  block->codec_version_k = Info(layout->pair().k).version;
  block->codec_version_v = Info(layout->pair().v).version;
  block->touch_serial = ++serial_;
  stored_bytes_ += place->bytes;
  this->tier(tier).policy->Insert(slot);
  return block;
}

Place* BlockStore::Reserve(int tier, const Block& block) {
  return NewPlace(tier, block.layout->block_bytes(), block.layout->pair());
}

Place* BlockStore::ReserveAt(int tier, size_t offset, const Block& block) {
  const size_t bytes = block.layout->block_bytes();
  if (!this->tier(tier).allocator.AllocateAt(offset, bytes)) return nullptr;
  return PlaceAt(tier, offset, bytes, block.layout->pair());
}

Place* BlockStore::Claim(int tier, size_t offset, size_t bytes) {
  if (!this->tier(tier).allocator.AllocateAt(offset, bytes)) return nullptr;
  return PlaceAt(tier, offset, bytes, ExactPair());
}

void BlockStore::AddRef(Block* block, bool keeper) {
  block->refs++;
  if (block->refs == 2) shared_++;
  if (keeper) block->keepers++;
}

void BlockStore::Release(Block* block, bool keeper) {
  KVTIDE_CHECK(block->refs > 0 && block->keepers >= (keeper ? 1 : 0));
  block->refs--;
  if (block->refs == 1) shared_--;
  if (keeper) block->keepers--;
  DeleteIfUnused(block);
}

void BlockStore::Unhold(Block* block) {
  KVTIDE_CHECK(block->holds > 0);
  block->holds--;
  DeleteIfUnused(block);
}

// A held block without references keeps its bytes: its holder may be writing or copying them.
void BlockStore::DeleteIfUnused(Block* block) {
  if (block->refs > 0 || block->holds > 0) return;
  KVTIDE_CHECK(!block->moving);
  if (block->place != nullptr) {
    Place* place = block->place;
    tier(place->tier).policy->Remove(SlotOf(block->id));
    stored_bytes_ -= place->bytes;
    block->place = nullptr;
    Retire(place);
  }
  const BlockSlot slot = SlotOf(block->id);
  blocks_[slot].reset();
  free_slots_.push_back(slot);
}

void BlockStore::Pin(Place* place) {
  if (place->pins++ == 0) tier(place->tier).pinned++;
}

void BlockStore::Unpin(Place* place) {
  KVTIDE_CHECK(place->pins > 0);
  if (--place->pins > 0) return;
  tier(place->tier).pinned--;
  if (!place->retired) return;
  retired_.erase(std::find(retired_.begin(), retired_.end(), place));
  FreePlace(place);
}

void BlockStore::Retire(Place* place) {
  KVTIDE_CHECK(!place->retired);
  place->block = nullptr;
  if (place->pins == 0) {
    FreePlace(place);
    return;
  }
  place->retired = true;
  retired_.push_back(place);
}

void BlockStore::SwapPlace(Block* block, Place* place) {
  Place* old = block->place;
  KVTIDE_CHECK(old != nullptr && (place->tier == block->home || place->tier >= homes_));
  if (old->tier != place->tier) {
    tier(old->tier).policy->Remove(SlotOf(block->id));
    tier(place->tier).policy->Insert(SlotOf(block->id));
  }
  block->place = place;
  place->block = block;
  Retire(old);
}

void BlockStore::Drop(Block* block) {
  KVTIDE_CHECK(block->place != nullptr && !block->writing && !block->moving);
  Place* place = block->place;
  tier(place->tier).policy->Remove(SlotOf(block->id));
  tier(place->tier).dropped++;
  stored_bytes_ -= place->bytes;
  block->place = nullptr;
  block->has_checksum = false;
  Retire(place);
}

void BlockStore::Peek(int tier, absl::FunctionRef<bool(const Block&)> visit) const {
  this->tier(tier).policy->Peek([&](BlockSlot slot) { return visit(*blocks_[slot]); });
}

void BlockStore::Want(Block* block) {
  if (block->wanted || wanted_.size() >= kMostWanted) return;
  block->wanted = true;
  wanted_.push_back(block->id);
}

std::vector<Block*> BlockStore::TakeWanted() {
  std::vector<Block*> blocks;
  for (const BlockId id : wanted_) {
    Block* block = Get(id);
    if (block == nullptr || !block->wanted) continue;
    block->wanted = false;
    blocks.push_back(block);
  }
  wanted_.clear();
  return blocks;
}

void BlockStore::Touch(Block* block, absl::Time now) {
  block->touch_serial = ++serial_;
  block->last_touched = now;
  if (block->place != nullptr) tier(block->place->tier).policy->Touch(SlotOf(block->id));
}

void BlockStore::CheckInvariants() const {
  std::vector<uint64_t> used(tiers_.size()), places(tiers_.size()), in_policy(tiers_.size());
  uint64_t shared = 0, stored = 0;
  ForEach([&](const Block& block) {
    KVTIDE_CHECK(block.refs + block.holds > 0, "block ", block.id, " belongs to nobody");
    KVTIDE_CHECK(block.keepers <= block.refs);
    if (block.refs > 1) shared++;
    if (block.place == nullptr) return;
    const Place& place = *block.place;
    KVTIDE_CHECK(!place.retired && place.bytes == block.layout->block_bytes() &&
                 place.pair == block.layout->pair());
    KVTIDE_CHECK(place.tier == block.home || place.tier >= homes_, "block ", block.id, " of device ",
                 block.home, " lies in tier ", place.tier);
    const auto t = static_cast<size_t>(place.tier);
    KVTIDE_CHECK(place.data == tiers_[t].slab->data() + place.offset && place.block == &block);
    used[t] += place.bytes;
    places[t]++;
    stored += place.bytes;
  });
  KVTIDE_CHECK(shared == shared_ && stored == stored_bytes_, "shared ", shared, "/", shared_, " stored ",
               stored, "/", stored_bytes_);
  for (const Place* place : retired_) {
    KVTIDE_CHECK(place->pins > 0 && place->retired);
    used[static_cast<size_t>(place->tier)] += place->bytes;
  }
  for (size_t t = 0; t < tiers_.size(); t++) {
    const Tier& tier = tiers_[t];
    tier.allocator.CheckInvariants();
    // Places reserved by moves that are running belong to no block yet.
    KVTIDE_CHECK(used[t] <= tier.allocator.used_bytes(), "tier ", tier.name, ": ", used[t], " of ",
                 tier.allocator.used_bytes());
    uint64_t pair_bytes = 0, pair_blocks = 0;
    for (const PairStats& pair : tier.pairs) {
      pair_bytes += pair.bytes;
      pair_blocks += pair.blocks;
    }
    KVTIDE_CHECK(pair_bytes == tier.allocator.used_bytes() && pair_blocks == tier.blocks &&
                 tier.pinned <= tier.blocks);
    tier.policy->Peek([&](BlockSlot id) {
      KVTIDE_CHECK(blocks_[id] != nullptr && blocks_[id]->place != nullptr &&
                   blocks_[id]->place->tier == static_cast<int>(t));
      in_policy[t]++;
      return true;
    });
    size_t end = 0, placed = 0;
    for (const auto& [offset, place] : tier.places) {
      KVTIDE_CHECK(place->offset == offset && offset >= end, "places overlap at ", offset);
      end = offset + ExtentAllocator::RoundUp(place->bytes);
      placed += ExtentAllocator::RoundUp(place->bytes);
    }
    KVTIDE_CHECK(placed == tier.allocator.used_bytes() && tier.places.size() == tier.blocks);
    KVTIDE_CHECK(in_policy[t] == places[t], "tier ", tier.name, ": ", in_policy[t], " in the policy, ",
                 places[t], " blocks");
  }
}

}  // namespace kvtide
