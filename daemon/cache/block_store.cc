#include "daemon/cache/block_store.h"

#include <algorithm>
#include <utility>

#include "daemon/cache/block_table.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {

BlockStore::~BlockStore() {
  for (const auto& block : blocks_)
    if (block != nullptr) delete block->place;
  for (Place* place : retired_) delete place;
  blocks_.clear();  // before the slots of their records
}

absl::Status BlockStore::Init(const CacheOptions& options) {
  homes_ = CountHomes(options.tiers);
  for (const TierOptions& from : options.tiers) {
    Tier& tier = tiers_.emplace_back();
    tier.name = from.name;
    tier.device = from.Device();
    tier.backend = from.backend;
    tier.io = from.io;
    tier.checksum = from.checksum;
    tier.allocator = ExtentAllocator(from.capacity_bytes);
    tier.policy = MakeLruPolicy();
    tier.pairs.resize(kOpaquePairIndex + 1);
    if (!tier.attends()) continue;
    absl::StatusOr<std::unique_ptr<Slab>> slab = from.backend->AllocateSlab(tier.allocator.capacity_bytes());
    if (!slab.ok())
      return Annotate(slab.status(), absl::StrCat("tier '", from.name, "' of ", from.capacity_bytes,
                                                  " bytes on ", tier.device));
    tier.slab = std::move(slab).value();
  }
  return absl::OkStatus();
}

size_t Tier::LargestRoom() const {
  const size_t extent = allocator.LargestFreeExtent();
  if (io == nullptr) return extent;
  // The label, and rounding to pages at most.
  const size_t most = io->ExtentBytes(1);
  return extent > most ? extent - most : 0;
}

Place* BlockStore::NewPlace(int tier_index, size_t bytes, size_t pair_index) {
  Tier& tier = this->tier(tier_index);
  const bool exact = pair_index == PairIndex(ExactPair());
  const auto end = exact ? ExtentAllocator::End::kTop : ExtentAllocator::End::kBottom;
  const std::optional<size_t> offset = tier.allocator.Allocate(tier.ExtentBytes(bytes), end);
  return offset.has_value() ? PlaceAt(tier_index, *offset, bytes, pair_index) : nullptr;
}

// The bytes are allocated.
Place* BlockStore::PlaceAt(int tier_index, size_t offset, size_t bytes, size_t pair_index) {
  Tier& tier = this->tier(tier_index);
  auto place = std::make_unique<Place>();
  place->tier = tier_index;
  place->offset = offset;
  place->bytes = bytes;
  place->extent = ExtentAllocator::RoundUp(tier.ExtentBytes(bytes));
  if (tier.slab != nullptr) place->data = tier.slab->data() + offset;
  place->pair_index = pair_index;
  tier.places[offset] = place.get();
  tier.blocks++;
  PairStats& stats = tier.pairs[pair_index];
  stats.blocks++;
  stats.bytes += place->extent;
  return place.release();
}

void BlockStore::FreeIfUnused(Place* place) {
  if (!place->retired || place->pins > 0 || place->pictures > 0 || place->keeps > 0) return;
  if (place->backup_of != nullptr) place->backup_of->backup = nullptr;
  retired_.erase(place);
  Tier& tier = this->tier(place->tier);
  tier.allocator.Free(place->offset, place->extent);
  tier.places.erase(place->offset);
  tier.blocks--;
  PairStats& stats = tier.pairs[place->pair_index];
  KVTIDE_CHECK(stats.blocks > 0 && stats.bytes >= place->extent);
  stats.blocks--;
  stats.bytes -= place->extent;
  if (place->account != nullptr) {
    place->account->tier_bytes[static_cast<size_t>(place->tier)] -= place->extent;
    place->account->places--;
  }
  delete place;
}

Block* BlockStore::Allocate(int tier, int home, const BlockForm& form) {
  KVTIDE_CHECK(tier == home || tier >= homes_);
  Place* place = NewPlace(tier, form.bytes, PairIndexOf(form));
  return place != nullptr ? NewBlock(place, home, form) : nullptr;
}

Block* BlockStore::AllocateAt(int tier, size_t offset, int home, const BlockForm& form) {
  const size_t bytes = form.bytes, extent = this->tier(tier).ExtentBytes(bytes);
  const ExtentAllocator& allocator = this->tier(tier).allocator;
  if (offset % ExtentAllocator::kAlignment != 0 || offset > allocator.capacity_bytes() ||
      extent > allocator.capacity_bytes() - offset || !this->tier(tier).allocator.AllocateAt(offset, extent))
    return nullptr;
  return NewBlock(PlaceAt(tier, offset, bytes, PairIndexOf(form)), home, form);
}

Block* BlockStore::NewBlock(Place* place, int home, const BlockForm& form) {
  uint32_t slot;
  if (free_slots_.empty()) {
    slot = static_cast<uint32_t>(blocks_.size());
    blocks_.emplace_back();
    uses_.push_back(0);
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  blocks_[slot] = std::make_unique<Block>();
  Block* block = blocks_[slot].get();
  block->id = BlockId{uses_[slot]++} << 32 | slot;
  block->layout = form.layout;
  block->bytes = form.bytes;
  block->place = place;
  place->block = block;
  block->home = home;
  if (form.layout != nullptr) {
    block->codec_version_k = Info(form.layout->pair().k).version;
    block->codec_version_v = Info(form.layout->pair().v).version;
  }
  stored_bytes_ += place->bytes;
  return block;
}

uint64_t BlockStore::QuotaLeft(const TenantAccount& account, int tier_index) const {
  const std::string& name = tier(tier_index).name;
  const uint64_t limit = account.limits.OfTier(name);
  if (limit == TenantLimits::kNone) return limit;
  uint64_t taken = 0;
  for (size_t t = 0; t < tiers_.size(); t++)
    if (tiers_[t].name == name) taken += account.tier_bytes[t];
  return limit - std::min(limit, taken);
}

bool BlockStore::MayLie(const Block& block, int tier_index) const {
  return block.account == nullptr ||
         tier(tier_index).ExtentBytes(block.bytes) <= QuotaLeft(*block.account, tier_index);
}

Place* BlockStore::Reserve(int tier, const Block& block) {
  if (!MayLie(block, tier)) return nullptr;
  Place* const place = NewPlace(tier, block.bytes, PairIndexOf(block.form()));
  if (place != nullptr) Charge(place, block.account);
  return place;
}

Place* BlockStore::ReserveAt(int tier, size_t offset, const Block& block) {
  const size_t bytes = block.bytes;
  if (!this->tier(tier).allocator.AllocateAt(offset, this->tier(tier).ExtentBytes(bytes))) return nullptr;
  Place* const place = PlaceAt(tier, offset, bytes, PairIndexOf(block.form()));
  Charge(place, block.account);
  return place;
}

Place* BlockStore::Claim(int tier, size_t offset, size_t bytes) {
  if (!this->tier(tier).allocator.AllocateAt(offset, bytes)) return nullptr;
  return PlaceAt(tier, offset, bytes, PairIndex(ExactPair()));
}

Chunk* BlockStore::NewChunk(TableFamily* family, bool keeper) {
  auto* chunk = new Chunk;
  chunk->tiers.resize(tiers_.size());
  chunk->owners = 1;
  chunk->keepers = keeper ? 1 : 0;
  chunk->family = family;
  CountTableBytes(sizeof(Chunk));
  return chunk;
}

void BlockStore::AddOwner(Chunk* chunk, bool keeper) {
  chunk->owners++;
  if (keeper) chunk->keepers++;
  if (chunk->owners == 2) shared_ += static_cast<uint64_t>(chunk->sole);
}

void BlockStore::RemoveOwner(Chunk* chunk, bool keeper) {
  KVTIDE_CHECK(chunk->owners > 0 && chunk->keepers >= (keeper ? 1 : 0));
  if (chunk->owners == 1) {
    chunk->picture.reset();
    for (int slot = 0; slot < kChunkBlocks && chunk->count > 0; slot++)
      if (chunk->blocks[static_cast<size_t>(slot)] != nullptr) Leave(chunk, slot);
    CountTableBytes(-static_cast<int64_t>(sizeof(Chunk)));
    delete chunk;
    return;
  }
  chunk->owners--;
  if (keeper) chunk->keepers--;
  if (chunk->owners == 1) shared_ -= static_cast<uint64_t>(chunk->sole);
}

void BlockStore::CountShared(const Block& block, int references_before) {
  const int now = block.references();
  if (references_before <= 1 && now > 1) shared_++;
  if (references_before > 1 && now <= 1) shared_--;
}

void BlockStore::CountInChunks(const Block& block, int sign) {
  for (Chunk* chunk : block.chunks) {
    if (block.place == nullptr) {
      chunk->dropped += sign;
      continue;
    }
    BlockCount& count = chunk->tiers[static_cast<size_t>(block.place->tier)];
    count.blocks += static_cast<uint64_t>(static_cast<int64_t>(sign));
    count.bytes += static_cast<uint64_t>(sign * static_cast<int64_t>(block.place->bytes));
  }
}

void BlockStore::Enter(Block* block, Chunk* chunk, int slot) {
  KVTIDE_CHECK(chunk->blocks[static_cast<size_t>(slot)] == nullptr);
  const int before = block->references();
  CountInChunks(*block, -1);
  if (block->chunks.size() == 1 && block->direct_entries == 0) block->chunks.front()->sole--;
  CountAlone(*block, -1);
  chunk->blocks[static_cast<size_t>(slot)] = block;
  chunk->count++;
  block->chunks.push_back(chunk);
  if (block->chunks.size() == 1 && block->direct_entries == 0) chunk->sole++;
  CountInChunks(*block, 1);
  CountShared(*block, before);
}

void BlockStore::Leave(Chunk* chunk, int slot) {
  Block* block = std::exchange(chunk->blocks[static_cast<size_t>(slot)], nullptr);
  KVTIDE_CHECK(block != nullptr);
  const int before = block->references();
  CountInChunks(*block, -1);
  if (block->chunks.size() == 1 && block->direct_entries == 0) chunk->sole--;
  chunk->count--;
  block->chunks.erase(std::find(block->chunks.begin(), block->chunks.end(), chunk));
  if (block->chunks.size() == 1 && block->direct_entries == 0) block->chunks.front()->sole++;
  CountInChunks(*block, 1);
  CountShared(*block, before);
  CountAlone(*block, 1);
  DeleteIfUnused(block);
}

void BlockStore::CountAlone(const Block& block, int sign) {
  if (block.prefix == nullptr || !block.chunks.empty() || block.place == nullptr) return;
  alone_bytes_ += static_cast<uint64_t>(sign * static_cast<int64_t>(block.place->bytes));
}

void BlockStore::AddDirect(Block* block, bool keeper) {
  const int before = block->references();
  if (block->chunks.size() == 1 && block->direct_entries == 0) block->chunks.front()->sole--;
  block->direct_entries++;
  if (keeper) block->direct_keepers++;
  CountShared(*block, before);
}

void BlockStore::RemoveDirect(Block* block, bool keeper) {
  KVTIDE_CHECK(block->direct_entries > 0 && block->direct_keepers >= (keeper ? 1 : 0));
  const int before = block->references();
  block->direct_entries--;
  if (keeper) block->direct_keepers--;
  if (block->chunks.size() == 1 && block->direct_entries == 0) block->chunks.front()->sole++;
  CountShared(*block, before);
  DeleteIfUnused(block);
}

void BlockStore::Unhold(Block* block) {
  KVTIDE_CHECK(block->holds > 0);
  block->holds--;
  DeleteIfUnused(block);
}

// A held block without references keeps its bytes: its holder may be writing or copying them.
void BlockStore::DeleteIfUnused(Block* block) {
  if (!block->chunks.empty() || block->direct_entries > 0 || block->prefix != nullptr || block->holds > 0)
    return;
  KVTIDE_CHECK(!block->moving);
  Unlink(block);
  ForgetBackup(block);
  if (block->place != nullptr) {
    Place* place = block->place;
    stored_bytes_ -= place->bytes;
    block->place = nullptr;
    Retire(place);
  } else {
    dropped_--;
  }
  const uint32_t slot = SlotOf(block->id);
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
  FreeIfUnused(place);
}

void BlockStore::LeavePicture(Place* place) {
  KVTIDE_CHECK(place->pictures > 0);
  place->pictures--;
  FreeIfUnused(place);
}

void BlockStore::Unkeep(Place* place) {
  KVTIDE_CHECK(place->keeps > 0);
  place->keeps--;
  FreeIfUnused(place);
}

void BlockStore::SetBackup(Block* block, Place* place) {
  KVTIDE_CHECK(place->retired && place->backup_of == nullptr);
  ForgetBackup(block);
  block->backup = place;
  place->backup_of = block;
}

void BlockStore::ForgetBackup(Block* block) {
  if (block->backup == nullptr) return;
  block->backup->backup_of = nullptr;
  block->backup = nullptr;
}

void BlockStore::MoveToBackup(Block* block) {
  Place* backup = block->backup;
  KVTIDE_CHECK(backup != nullptr && block->place != nullptr);
  ForgetBackup(block);
  block->has_checksum = true;
  block->checksum = backup->checksum;
  retired_.erase(backup);
  backup->retired = false;
  SwapPlace(block, backup);
}

void BlockStore::Retire(Place* place) {
  KVTIDE_CHECK(!place->retired);
  place->block = nullptr;
  place->retired = true;
  retired_.insert(place);
  FreeIfUnused(place);
}

void BlockStore::MakeStale(const Block& block) {
  for (Chunk* chunk : block.chunks) {
    chunk->family->DropSnapshots();
    chunk->picture.reset();
  }
}

void BlockStore::SwapPlace(Block* block, Place* place) {
  Place* old = block->place;
  KVTIDE_CHECK(old != nullptr && (place->tier == block->home || place->tier >= homes_));
  MakeStale(*block);
  if (old->tier != place->tier) {
    CountInChunks(*block, -1);
    const RecencyPtr record = block->record;
    Unlink(block);
    block->place = place;
    if (record != nullptr) Join(block, record);
    CountInChunks(*block, 1);
  }
  block->place = place;
  place->block = block;
  // What a manifest keeps has the block's bytes still.
  const bool kept = old->keeps > 0;
  Retire(old);
  if (kept) SetBackup(block, old);
}

void BlockStore::Drop(Block* block) {
  KVTIDE_CHECK(block->place != nullptr && !block->writing && !block->moving);
  const bool was_keyed = block->keyed;
  if (was_keyed) forget_(block);
  if (block->prefix != nullptr) forget_prefix_(block);
  MakeStale(*block);
  CountInChunks(*block, -1);
  Unlink(block);
  Place* place = std::exchange(block->place, nullptr);
  CountInChunks(*block, 1);
  dropped_++;
  tier(place->tier).dropped++;
  stored_bytes_ -= place->bytes;
  block->has_checksum = false;
  ForgetBackup(block);
  Retire(place);
  if (was_keyed) return RemoveDirect(block, false);
  DeleteIfUnused(block);
}

RecencyPtr BlockStore::NewRecency(absl::Time now) {
  RecordSlot slot;
  if (free_records_.empty()) {
    slot = static_cast<RecordSlot>(records_.size());
    records_.push_back(nullptr);
  } else {
    slot = free_records_.back();
    free_records_.pop_back();
  }
  auto* record = new Recency;
  record->slot = slot;
  record->tiers.resize(tiers_.size());
  record->touch_serial = ++serial_;
  record->last_touched = now;
  records_[slot] = record;
  return RecencyPtr(record, [this](Recency* unused) {
    records_[unused->slot] = nullptr;
    free_records_.push_back(unused->slot);
    delete unused;
  });
}

void BlockStore::Join(Block* block, const RecencyPtr& record, End end) {
  if (block->record != nullptr || block->place == nullptr) return;
  block->record = record->merged_into != nullptr ? record->merged_into : record;
  Link(block, end);
}

void BlockStore::Rejoin(Block* block, const RecencyPtr& record, End end) {
  if (block->place == nullptr) return;
  Unlink(block);
  Join(block, record, end);
}

uint64_t BlockStore::BlocksOf(const RecencyPtr& record) const {
  uint64_t blocks = 0;
  for (const Recency::List& list : Root(record.get())->tiers) blocks += list.blocks;
  return blocks;
}

void BlockStore::Link(Block* block, End end) {
  Recency* record = Root(block->record);
  Tier& tier = this->tier(block->place->tier);
  Recency::List& list = record->tiers[static_cast<size_t>(block->place->tier)];
  if (end == End::kHottest) {
    block->previous = list.last;
    block->next = nullptr;
    (list.last != nullptr ? list.last->next : list.first) = block;
    list.last = block;
  } else {
    block->next = list.first;
    block->previous = nullptr;
    (list.first != nullptr ? list.first->previous : list.last) = block;
    list.first = block;
  }
  if (list.blocks++ == 0) tier.policy->Insert(record->slot);
  if (record->readers > 0) tier.read++;
}

void BlockStore::Unlink(Block* block) {
  if (block->record == nullptr) return;
  Recency* record = Root(block->record);
  Tier& tier = this->tier(block->place->tier);
  Recency::List& list = record->tiers[static_cast<size_t>(block->place->tier)];
  (block->previous != nullptr ? block->previous->next : list.first) = block->next;
  (block->next != nullptr ? block->next->previous : list.last) = block->previous;
  block->previous = block->next = nullptr;
  if (--list.blocks == 0) tier.policy->Remove(record->slot);
  if (record->readers > 0) tier.read--;
  block->record.reset();
}

void BlockStore::Merge(const RecencyPtr& from, const RecencyPtr& into) {
  KVTIDE_CHECK(from->merged_into == nullptr && into->merged_into == nullptr && from != into);
  const bool read = from->readers + into->readers > 0;
  for (size_t t = 0; t < tiers_.size(); t++) {
    Recency::List& source = from->tiers[t];
    Recency::List& target = into->tiers[t];
    if (read && from->readers == 0) tiers_[t].read += source.blocks;
    if (read && into->readers == 0) tiers_[t].read += target.blocks;
    if (source.blocks == 0) continue;
    tiers_[t].policy->Remove(from->slot);
    if (target.blocks == 0) {
      tiers_[t].policy->Insert(into->slot);
      target = source;
    } else {
      target.last->next = source.first;
      source.first->previous = target.last;
      target.last = source.last;
      target.blocks += source.blocks;
    }
    source = {};
  }
  into->readers += std::exchange(from->readers, 0);
  into->touch_serial = std::max(into->touch_serial, from->touch_serial);
  into->last_touched = std::max(into->last_touched, from->last_touched);
  if (from->wanted && !into->wanted) {
    into->wanted = true;
    wanted_.push_back(into);
  }
  from->wanted = false;
  from->merged_into = into;
}

void BlockStore::ForkRecency(SequenceRecency* parent, SequenceRecency* child) {
  const absl::Time now = parent->own->last_touched;
  const bool has_blocks = std::any_of(parent->own->tiers.begin(), parent->own->tiers.end(),
                                      [](const Recency::List& list) { return list.blocks > 0; });
  if (parent->family == nullptr) {
    parent->family = std::move(parent->own);
    parent->own = NewRecency(now);
  } else if (has_blocks) {
    Merge(parent->own, parent->family);
    parent->own = NewRecency(now);
  }
  child->family = parent->family;
  child->prefixes = parent->prefixes;
  child->own = NewRecency(now);
}

void BlockStore::Touch(const SequenceRecency& sequence, absl::Time now) {
  sequence.ForEach([&](const RecencyPtr& record) { TouchRecord(Root(record), now); });
}

void BlockStore::Touch(const Block& block, absl::Time now) {
  if (block.record != nullptr) TouchRecord(Root(block.record), now);
}

void BlockStore::TouchRecord(Recency* root, absl::Time now) {
  root->touch_serial = ++serial_;
  root->last_touched = now;
  for (size_t t = 0; t < tiers_.size(); t++)
    if (root->tiers[t].blocks > 0) tiers_[t].policy->Touch(root->slot);
}

void BlockStore::BeginRead(const RecencyPtr& record) {
  Recency* root = Root(record);
  if (root->readers++ > 0) return;
  for (size_t t = 0; t < tiers_.size(); t++) tiers_[t].read += root->tiers[t].blocks;
}

void BlockStore::EndRead(const RecencyPtr& record) {
  Recency* root = Root(record);
  KVTIDE_CHECK(root->readers > 0);
  if (--root->readers > 0) return;
  for (size_t t = 0; t < tiers_.size(); t++) tiers_[t].read -= root->tiers[t].blocks;
}

void BlockStore::Peek(int tier, absl::FunctionRef<bool(const Block&)> visit) const {
  this->tier(tier).policy->Peek([&](RecordSlot slot) {
    const Block* block = records_[slot]->tiers[static_cast<size_t>(tier)].first;
    for (; block != nullptr; block = block->next)
      if (!visit(*block)) return false;
    return true;
  });
}

void BlockStore::PeekIdle(int tier, uint64_t before_serial,
                          absl::FunctionRef<bool(const Block&)> visit) const {
  this->tier(tier).policy->Peek([&](RecordSlot slot) {
    const Recency& record = *records_[slot];
    if (record.readers > 0 || record.pinned || record.touch_serial >= before_serial) return true;
    const Block* block = record.tiers[static_cast<size_t>(tier)].first;
    for (; block != nullptr; block = block->next)
      if (IsIdle(*block) && !visit(*block)) return false;
    return true;
  });
}

void BlockStore::Want(const SequenceRecency& sequence) {
  sequence.ForEach([&](const RecencyPtr& record) {
    Recency* root = Root(record);
    if (root->wanted) return;
    for (size_t t = static_cast<size_t>(homes_); t < tiers_.size(); t++) {
      if (root->tiers[t].blocks == 0) continue;
      root->wanted = true;
      wanted_.push_back(record->merged_into != nullptr ? record->merged_into : record);
      break;
    }
  });
}

void BlockStore::Unwant(const SequenceRecency& sequence) {
  sequence.ForEach([&](const RecencyPtr& record) { Root(record)->wanted = false; });
}

std::vector<Block*> BlockStore::TakeWanted(size_t limit) {
  std::vector<Block*> blocks;
  for (const std::weak_ptr<Recency>& weak : wanted_) {
    const RecencyPtr record = weak.lock();
    if (record == nullptr || !record->wanted) continue;
    record->wanted = false;
    for (size_t t = static_cast<size_t>(homes_); t < tiers_.size(); t++)
      for (Block* block = record->tiers[t].first; block != nullptr && blocks.size() < limit;
           block = block->next)
        blocks.push_back(block);
  }
  wanted_.clear();
  return blocks;
}

void BlockStore::CheckInvariants() const {
  std::vector<uint64_t> used(tiers_.size()), in_policy(tiers_.size()), linked(tiers_.size()),
      read(tiers_.size());
  uint64_t shared = 0, stored = 0, dropped = 0;
  absl::flat_hash_set<const Chunk*> chunks;
  ForEach([&](const Block& block) {
    KVTIDE_CHECK(block.used() || block.holds > 0, "block ", block.id, " belongs to nobody");
    KVTIDE_CHECK(block.keepers() <= block.references());
    if (block.references() > 1) shared++;
    chunks.insert(block.chunks.begin(), block.chunks.end());
    KVTIDE_CHECK(block.record == nullptr || block.place != nullptr, "block ", block.id,
                 " without bytes is in a list");
    if (block.place == nullptr) {
      dropped++;
      return;
    }
    const Place& place = *block.place;
    KVTIDE_CHECK(!place.retired && place.bytes == block.bytes &&
                 place.pair_index == PairIndexOf(block.form()));
    KVTIDE_CHECK(place.tier == block.home || place.tier >= homes_, "block ", block.id, " of device ",
                 block.home, " lies in tier ", place.tier);
    const auto t = static_cast<size_t>(place.tier);
    KVTIDE_CHECK(place.data == (tiers_[t].attends() ? tiers_[t].slab->data() + place.offset : nullptr) &&
                 place.block == &block && (tiers_[t].attends() || block.has_checksum));
    used[t] += place.extent;
    stored += place.bytes;
    if (block.record != nullptr) linked[t]++;
  });
  KVTIDE_CHECK(shared == shared_ && stored == stored_bytes_ && dropped == dropped_, "shared ", shared, "/",
               shared_, " stored ", stored, "/", stored_bytes_, " dropped ", dropped, "/", dropped_);
  for (const Chunk* chunk : chunks) CheckChunk(*chunk);
  for (const Place* place : retired_) {
    KVTIDE_CHECK(place->pins + place->pictures + place->keeps > 0 && place->retired);
    KVTIDE_CHECK(place->backup_of == nullptr || place->backup_of->backup == place);
    used[static_cast<size_t>(place->tier)] += place->extent;
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
    tier.policy->Peek([&](RecordSlot slot) {
      const Recency& record = *records_[slot];
      KVTIDE_CHECK(record.slot == slot && record.merged_into == nullptr);
      const Recency::List& list = record.tiers[t];
      uint64_t blocks = 0;
      for (const Block* block = list.first; block != nullptr; block = block->next, blocks++)
        KVTIDE_CHECK(block->place != nullptr && block->place->tier == static_cast<int>(t) &&
                     Root(block->record.get()) == &record && (block->next != nullptr || list.last == block));
      KVTIDE_CHECK(blocks == list.blocks && blocks > 0);
      in_policy[t] += blocks;
      if (record.readers > 0) read[t] += blocks;
      return true;
    });
    size_t end = 0, placed = 0;
    for (const auto& [offset, place] : tier.places) {
      KVTIDE_CHECK(place->offset == offset && offset >= end, "places overlap at ", offset);
      end = offset + ExtentAllocator::RoundUp(place->extent);
      placed += ExtentAllocator::RoundUp(place->extent);
    }
    KVTIDE_CHECK(placed == tier.allocator.used_bytes() && tier.places.size() == tier.blocks);
    KVTIDE_CHECK(in_policy[t] == linked[t] && read[t] == tier.read, "tier ", tier.name, ": ", in_policy[t],
                 " in the policy, ", linked[t], " blocks; ", read[t], " being read, ", tier.read, " counted");
  }
}

void BlockStore::CheckChunk(const Chunk& chunk) const {
  int count = 0, sole = 0, dropped = 0;
  std::vector<BlockCount> tiers(tiers_.size());
  for (const Block* block : chunk.blocks) {
    if (block == nullptr) continue;
    count++;
    KVTIDE_CHECK(std::count(block->chunks.begin(), block->chunks.end(), &chunk) == 1);
    if (block->chunks.size() == 1 && block->direct_entries == 0) sole++;
    if (block->place == nullptr) {
      dropped++;
      continue;
    }
    tiers[static_cast<size_t>(block->place->tier)].blocks++;
    tiers[static_cast<size_t>(block->place->tier)].bytes += block->place->bytes;
  }
  KVTIDE_CHECK(chunk.owners > 0 && chunk.keepers <= chunk.owners && count == chunk.count &&
                   sole == chunk.sole && dropped == chunk.dropped,
               "a chunk counts ", chunk.count, " entries, ", chunk.sole, " of its own, ", chunk.dropped,
               " dropped; there are ", count, ", ", sole, ", ", dropped);
  for (size_t t = 0; t < tiers.size(); t++)
    KVTIDE_CHECK(tiers[t].blocks == chunk.tiers[t].blocks && tiers[t].bytes == chunk.tiers[t].bytes);
}

}  // namespace kvtide
