#include "daemon/cache/block/block_store.h"

#include <algorithm>
#include <utility>

#include "daemon/cache/block/block_table.h"
#include "daemon/cache/tier/s3_fifo_policy.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {

BlockStore::~BlockStore() {
  // Records that blocks kept, while there are slots that they give back.
  for (size_t slot = 0; slot < records_.size(); slot++)
    if (records_[slot] != nullptr) const RecencyPtr record = std::move(records_[slot]->self);
}

absl::Status BlockStore::Init(const CacheOptions& options) {
  if (options.eviction == EvictionKind::kS3Fifo) ghosts_ = GhostKeys(true);
  homes_ = CountHomes(options.tiers);
  for (const TierOptions& from : options.tiers) {
    Tier& tier = tiers_.emplace_back();
    tier.name = from.name;
    tier.device = from.Device();
    tier.backend = from.backend;
    tier.io = from.io;
    tier.checksum = from.checksum;
    tier.allocator = ExtentAllocator(from.capacity_bytes);
    tier.policy = std::make_unique<PriorityOrder>(
        [kind = options.eviction] {
          return kind == EvictionKind::kS3Fifo ? MakeS3FifoPolicy() : MakeLruPolicy();
        },
        [this](RecordSlot slot) { return records_[slot]->readers == 0 && !records_[slot]->pinned; });
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
  const uint32_t slot = places_.Take();
  Place* const place = &places_[slot];
  *place = {};
  place->slot = slot;
  place->tier = static_cast<int8_t>(tier_index);
  place->offset = offset;
  place->extent_units =
      static_cast<uint32_t>(ExtentAllocator::RoundUp(tier.ExtentBytes(bytes)) / ExtentAllocator::kAlignment);
  place->pair_index = static_cast<uint16_t>(pair_index);
  tier.places[offset] = place;
  tier.blocks++;
  PairStats& stats = tier.pairs[pair_index];
  stats.blocks++;
  stats.bytes += place->extent();
  return place;
}

void BlockStore::FreeIfUnused(Place* place) {
  if (!place->retired || place->pins > 0 || place->pictures > 0 || place->keeps() > 0) return;
  if (place->block != kNoSlot) ForgetBackup(At(place->block));
  retired_.erase(place);
  Tier& tier = this->tier(place->tier);
  tier.allocator.Free(place->offset, place->extent());
  tier.places.erase(place->offset);
  tier.blocks--;
  PairStats& stats = tier.pairs[place->pair_index];
  KVTIDE_CHECK(stats.blocks > 0 && stats.bytes >= place->extent());
  stats.blocks--;
  stats.bytes -= place->extent();
  if (place->account != nullptr) {
    place->account->tier_bytes[static_cast<size_t>(place->tier)] -= place->extent();
    place->account->places--;
  }
  place->writing.reset();
  places_.Give(place->slot);
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
  const uint32_t slot = blocks_.Take();
  Block* const block = &blocks_[slot];
  block->id = block->id >> 32 << 32 | slot;
  block->place = place;
  place->block = slot;
  BlockKind kind;
  kind.layout = form.layout;
  kind.bytes = form.bytes;
  kind.home = home;
  SetKind(block, kind);
  stored_bytes_ += form.bytes;
  return block;
}

void BlockStore::SetKind(Block* block, const BlockKind& kind) {
  const auto [entry, added] = kinds_.insert(kind);
  if (added) entry->blocks = 0;
  entry->blocks++;
  LeaveKind(block);
  block->kind = &*entry;
  recodable_ += entry->NextRung() != nullptr;
}

void BlockStore::LeaveKind(Block* block) {
  const BlockKind* const kind = std::exchange(block->kind, nullptr);
  recodable_ -= kind != nullptr && kind->NextRung() != nullptr;
  if (kind != nullptr && --kind->blocks == 0) kinds_.erase(kinds_.find(*kind));
}

void BlockStore::SetProfile(Block* block, std::shared_ptr<const Profile> profile) {
  if (block->profile() == profile) return;
  BlockKind kind = *block->kind;
  kind.profile = std::move(profile);
  SetKind(block, kind);
}

void BlockStore::SetAccount(Block* block, std::shared_ptr<TenantAccount> account) {
  Charge(block->place, account.get());
  BlockKind kind = *block->kind;
  kind.account = std::move(account);
  SetKind(block, kind);
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
  return block.account() == nullptr ||
         tier(tier_index).ExtentBytes(block.bytes()) <= QuotaLeft(*block.account(), tier_index);
}

Place* BlockStore::Reserve(int tier, const Block& block) {
  if (!MayLie(block, tier)) return nullptr;
  Place* const place = NewPlace(tier, block.bytes(), PairIndexOf(block.form()));
  if (place != nullptr) Charge(place, block.account());
  return place;
}

Place* BlockStore::ReserveAs(const BlockForm& form, const Block& block) {
  const int tier = block.place->tier;
  if (block.account() != nullptr &&
      this->tier(tier).ExtentBytes(form.bytes) > QuotaLeft(*block.account(), tier))
    return nullptr;
  Place* const place = NewPlace(tier, form.bytes, PairIndexOf(form));
  if (place != nullptr) Charge(place, block.account());
  return place;
}

Place* BlockStore::ReserveAt(int tier, size_t offset, const Block& block) {
  const size_t bytes = block.bytes();
  if (!this->tier(tier).allocator.AllocateAt(offset, this->tier(tier).ExtentBytes(bytes))) return nullptr;
  Place* const place = PlaceAt(tier, offset, bytes, PairIndexOf(block.form()));
  Charge(place, block.account());
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
    count.bytes += static_cast<uint64_t>(sign * static_cast<int64_t>(block.bytes()));
    if (block.kind->IsDegraded()) chunk->degraded += sign;
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
  block->chunks.Add(chunk);
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
  block->chunks.Remove(chunk);
  if (block->chunks.size() == 1 && block->direct_entries == 0) block->chunks.front()->sole++;
  CountInChunks(*block, 1);
  CountShared(*block, before);
  CountAlone(*block, 1);
  DeleteIfUnused(block);
}

void BlockStore::CountAlone(const Block& block, int sign) {
  if (block.prefix() == nullptr || !block.chunks.empty() || block.place == nullptr) return;
  alone_bytes_ += static_cast<uint64_t>(sign * static_cast<int64_t>(block.bytes()));
}

void BlockStore::AddDirect(Block* block, bool keeper) {
  const int before = block->references();
  if (block->chunks.size() == 1 && block->direct_entries == 0) block->chunks.front()->sole--;
  KVTIDE_CHECK(block->direct_entries < (1 << 24) - 1);
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
  if (!block->chunks.empty() || block->direct_entries > 0 || block->prefix() != nullptr || block->holds > 0)
    return;
  KVTIDE_CHECK(!block->moving);
  Unlink(block);
  ForgetBackup(block);
  if (block->place != nullptr) {
    Place* place = block->place;
    stored_bytes_ -= block->bytes();
    block->place = nullptr;
    Retire(place);
  } else {
    dropped_--;
  }
  LeaveKind(block);
  const BlockId next = block->id + (BlockId{1} << 32);
  *block = {};
  block->id = next;
  blocks_.Give(SlotOf(next));
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
  KVTIDE_CHECK(place->keeps() > 0);
  place->writing->keeps--;
  FreeIfUnused(place);
}

void BlockStore::SetBackup(Block* block, Place* place) {
  KVTIDE_CHECK(place->retired && place->block == kNoSlot);
  ForgetBackup(block);
  const uint32_t slot = SlotOf(block->id);
  backups_[slot] = place;
  block->has_backup = true;
  place->block = slot;
}

void BlockStore::ForgetBackup(Block* block) {
  if (!block->has_backup) return;
  const auto backup = backups_.find(SlotOf(block->id));
  backup->second->block = kNoSlot;
  backups_.erase(backup);
  block->has_backup = false;
}

void BlockStore::MoveToBackup(Block* block) {
  Place* backup = Backup(*block);
  KVTIDE_CHECK(backup != nullptr && block->place != nullptr);
  ForgetBackup(block);
  block->has_checksum = true;
  block->checksum = backup->Written().checksum;
  retired_.erase(backup);
  backup->retired = false;
  SwapPlace(block, backup);
}

void BlockStore::Retire(Place* place) {
  KVTIDE_CHECK(!place->retired);
  place->block = kNoSlot;
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
  KVTIDE_CHECK(old != nullptr && (place->tier == block->home() || place->tier >= homes_));
  MakeStale(*block);
  if (old->tier != place->tier) {
    if (old->tier < place->tier && block->record != kNoSlot) tier(old->tier).policy->Evict(Root(*block).slot);
    CountInChunks(*block, -1);
    const RecencyPtr record = RecordOf(*block);
    Unlink(block);
    block->place = place;
    if (record != nullptr) Join(block, record);
    CountInChunks(*block, 1);
  }
  block->place = place;
  place->block = SlotOf(block->id);
  // What a manifest keeps has the block's bytes still.
  const bool kept = old->keeps() > 0;
  Retire(old);
  if (kept) SetBackup(block, old);
}

void BlockStore::SwapForm(Block* block, Place* place, const BlockLayout* layout) {
  Place* const old = block->place;
  KVTIDE_CHECK(old != nullptr && old->tier == place->tier && old->keeps() == 0 && !block->has_backup);
  MakeStale(*block);
  CountInChunks(*block, -1);
  CountAlone(*block, -1);
  stored_bytes_ -= block->bytes();
  const BlockKind before = *block->kind;
  BlockKind kind = before;
  kind.layout = layout;
  kind.bytes = layout->block_bytes();
  SetKind(block, kind);
  block->place = place;
  place->block = SlotOf(block->id);
  stored_bytes_ += block->bytes();
  if (block->keyed) recoded_(*block, before);
  CountAlone(*block, 1);
  CountInChunks(*block, 1);
  Retire(old);
}

void BlockStore::Drop(Block* block) {
  KVTIDE_CHECK(block->place != nullptr && !block->writing && !block->moving);
  const bool was_keyed = block->keyed;
  if (block->record != kNoSlot) {
    const Recency& record = Root(*block);
    tier(block->place->tier).policy->Evict(record.slot);
    if (record.standing == Standing::kNew) ghosts_.Add(GhostOf(block->key, block->group()), blocks_.size());
  }
  if (was_keyed) forget_(block);
  if (block->prefix() != nullptr) forget_prefix_(block);
  MakeStale(*block);
  CountInChunks(*block, -1);
  Unlink(block);
  Place* place = std::exchange(block->place, nullptr);
  CountInChunks(*block, 1);
  dropped_++;
  tier(place->tier).dropped++;
  stored_bytes_ -= block->bytes();
  block->has_checksum = false;
  ForgetBackup(block);
  Retire(place);
  if (was_keyed) return RemoveDirect(block, false);
  DeleteIfUnused(block);
}

RecencyPtr BlockStore::NewRecency(absl::Time now, Standing standing, Priority priority) {
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
  record->standing = standing;
  record->priority = priority;
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

void BlockStore::MakeNew(const RecencyPtr& record) {
  Recency* const root = Root(record);
  root->standing = Standing::kNew;
  for (size_t t = 0; t < tiers_.size(); t++)
    if (root->tiers[t].blocks > 0) tiers_[t].policy->Stand(root->slot, root->standing);
}

void BlockStore::SetPriority(const RecencyPtr& record, Priority priority) {
  Recency* const root = Root(record);
  root->priority = priority;
  for (size_t t = 0; t < tiers_.size(); t++)
    if (root->tiers[t].blocks > 0) tiers_[t].policy->SetPriority(root->slot, priority);
}

void BlockStore::Join(Block* block, const RecencyPtr& record, End end) {
  if (block->record != kNoSlot || block->place == nullptr) return;
  const RecencyPtr& root = record->merged_into != nullptr ? record->merged_into : record;
  block->record = root->slot;
  if (root->members++ == 0) root->self = root;
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
  Recency* record = RootOf(*block);
  Tier& tier = this->tier(block->place->tier);
  Recency::List& list = record->tiers[static_cast<size_t>(block->place->tier)];
  const uint32_t slot = SlotOf(block->id);
  if (end == End::kHottest) {
    block->previous = list.last;
    block->next = kNoSlot;
    (list.last != kNoSlot ? blocks_[list.last].next : list.first) = slot;
    list.last = slot;
  } else {
    block->next = list.first;
    block->previous = kNoSlot;
    (list.first != kNoSlot ? blocks_[list.first].previous : list.last) = slot;
    list.first = slot;
  }
  if (list.blocks++ == 0)
    tier.policy->Insert(record->slot, record->standing, block->account(), record->priority);
  tier.policy->Count(record->slot, 1);
  if (record->readers > 0) tier.read++;
}

void BlockStore::Unlink(Block* block) {
  if (block->record == kNoSlot) return;
  Recency* record = RootOf(*block);
  Tier& tier = this->tier(block->place->tier);
  Recency::List& list = record->tiers[static_cast<size_t>(block->place->tier)];
  (block->previous != kNoSlot ? blocks_[block->previous].next : list.first) = block->next;
  (block->next != kNoSlot ? blocks_[block->next].previous : list.last) = block->previous;
  block->previous = block->next = kNoSlot;
  tier.policy->Count(record->slot, -1);
  if (--list.blocks == 0) tier.policy->Remove(record->slot);
  if (record->readers > 0) tier.read--;
  Recency* const named = records_[std::exchange(block->record, kNoSlot)];
  if (--named->members == 0) const RecencyPtr last = std::move(named->self);
}

void BlockStore::Merge(const RecencyPtr& from, const RecencyPtr& into) {
  KVTIDE_CHECK(from->merged_into == nullptr && into->merged_into == nullptr && from != into);
  const bool read = from->readers + into->readers > 0;
  RaisePriority(into, from->priority);
  for (size_t t = 0; t < tiers_.size(); t++) {
    Recency::List& source = from->tiers[t];
    Recency::List& target = into->tiers[t];
    if (read && from->readers == 0) tiers_[t].read += source.blocks;
    if (read && into->readers == 0) tiers_[t].read += target.blocks;
    if (source.blocks == 0) continue;
    const auto moved = static_cast<int64_t>(source.blocks);
    const PriorityOrder::Tenant tenant = tiers_[t].policy->TenantOf(from->slot);
    tiers_[t].policy->Count(from->slot, -moved);
    tiers_[t].policy->Remove(from->slot);
    if (target.blocks == 0) {
      tiers_[t].policy->Insert(into->slot, into->standing, tenant, into->priority);
      target = source;
    } else {
      blocks_[target.last].next = source.first;
      blocks_[source.first].previous = target.last;
      target.last = source.last;
      target.blocks += source.blocks;
    }
    tiers_[t].policy->Count(into->slot, moved);
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
  const Priority priority = parent->own->priority;
  const bool has_blocks = std::any_of(parent->own->tiers.begin(), parent->own->tiers.end(),
                                      [](const Recency::List& list) { return list.blocks > 0; });
  if (parent->family == nullptr) {
    parent->family = std::move(parent->own);
    parent->own = NewRecency(now, Standing::kUsed, priority);
  } else if (has_blocks) {
    Merge(parent->own, parent->family);
    parent->own = NewRecency(now, Standing::kUsed, priority);
  }
  child->family = parent->family;
  child->prefixes = parent->prefixes;
  child->own = NewRecency(now, Standing::kUsed, priority);
}

void BlockStore::Touch(const SequenceRecency& sequence, absl::Time now) {
  sequence.ForEach([&](const RecencyPtr& record) { TouchRecord(Root(record), now); });
}

void BlockStore::Touch(const Block& block, absl::Time now) {
  if (block.record != kNoSlot) TouchRecord(RootOf(block), now);
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
    const Block* block = At(records_[slot]->tiers[static_cast<size_t>(tier)].first);
    for (; block != nullptr; block = At(block->next))
      if (!visit(*block)) return false;
    return true;
  });
}

void BlockStore::PeekIdle(int tier, uint64_t before_serial,
                          absl::FunctionRef<bool(const Block&)> visit) const {
  this->tier(tier).policy->Peek(
      [&](RecordSlot slot) {
        const Recency& record = *records_[slot];
        return record.readers == 0 && !record.pinned && record.touch_serial < before_serial;
      },
      [&](RecordSlot slot) {
        const Block* block = At(records_[slot]->tiers[static_cast<size_t>(tier)].first);
        for (; block != nullptr; block = At(block->next))
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
  struct Wanted {
    RecencyPtr record;
    PriorityOrder::Tenant tenant = nullptr;
  };
  std::vector<Wanted> wanted;
  for (const std::weak_ptr<Recency>& weak : wanted_) {
    RecencyPtr record = weak.lock();
    if (record == nullptr || !std::exchange(record->wanted, false)) continue;
    for (size_t t = static_cast<size_t>(homes_); t < tiers_.size(); t++) {
      if (record->tiers[t].blocks == 0) continue;
      wanted.push_back({record, tiers_[t].policy->TenantOf(record->slot)});
      break;
    }
  }
  wanted_.clear();
  HigherFirst(
      std::span(wanted), [](const Wanted& one) { return one.tenant; },
      [](const Wanted& one) { return one.record->priority; });
  std::vector<Block*> blocks;
  for (const Wanted& one : wanted)
    for (size_t t = static_cast<size_t>(homes_); t < tiers_.size(); t++)
      for (Block* block = At(one.record->tiers[t].first); block != nullptr && blocks.size() < limit;
           block = At(block->next))
        blocks.push_back(block);
  return blocks;
}

void BlockStore::CheckInvariants() const {
  std::vector<uint64_t> used(tiers_.size()), in_policy(tiers_.size()), linked(tiers_.size()),
      read(tiers_.size());
  uint64_t shared = 0, stored = 0, dropped = 0;
  absl::flat_hash_set<const Chunk*> chunks;
  absl::flat_hash_map<const BlockKind*, uint64_t> kinds;
  uint64_t backups = 0;
  ForEach([&](const Block& block) {
    kinds[block.kind]++;
    if (const Place* const backup = Backup(block); backup != nullptr) {
      KVTIDE_CHECK(backup->retired && At(backup->block) == &block);
      backups++;
    }
    KVTIDE_CHECK(block.used() || block.holds > 0, "block ", block.id, " belongs to nobody");
    KVTIDE_CHECK(block.keepers() <= block.references());
    if (block.references() > 1) shared++;
    chunks.insert(block.chunks.begin(), block.chunks.end());
    KVTIDE_CHECK(block.record == kNoSlot || block.place != nullptr, "block ", block.id,
                 " without bytes is in a list");
    if (block.place == nullptr) {
      dropped++;
      return;
    }
    const Place& place = *block.place;
    KVTIDE_CHECK(!place.retired &&
                 place.extent() == ExtentAllocator::RoundUp(tier(place.tier).ExtentBytes(block.bytes())) &&
                 place.pair_index == PairIndexOf(block.form()));
    KVTIDE_CHECK(place.tier == block.home() || place.tier >= homes_, "block ", block.id, " of device ",
                 block.home(), " lies in tier ", place.tier);
    const auto t = static_cast<size_t>(place.tier);
    KVTIDE_CHECK(BlockAt(place) == &block && (tiers_[t].attends() || block.has_checksum));
    used[t] += place.extent();
    stored += block.bytes();
    if (block.record != kNoSlot) linked[t]++;
  });
  KVTIDE_CHECK(backups == backups_.size() && kinds.size() == kinds_.size());
  uint64_t recodable = 0;
  for (const BlockKind& kind : kinds_) {
    KVTIDE_CHECK(kinds[&kind] == kind.blocks);
    if (kind.NextRung() != nullptr) recodable += kind.blocks;
  }
  KVTIDE_CHECK(recodable == recodable_);
  KVTIDE_CHECK(shared == shared_ && stored == stored_bytes_ && dropped == dropped_, "shared ", shared, "/",
               shared_, " stored ", stored, "/", stored_bytes_, " dropped ", dropped, "/", dropped_);
  for (const Chunk* chunk : chunks) CheckChunk(*chunk);
  for (const Place* place : retired_) {
    KVTIDE_CHECK(place->pins + place->pictures + place->keeps() > 0 && place->retired);
    KVTIDE_CHECK(place->block == kNoSlot || Backup(*At(place->block)) == place);
    used[static_cast<size_t>(place->tier)] += place->extent();
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
      KVTIDE_CHECK(record.slot == slot && record.merged_into == nullptr &&
                   tier.policy->PriorityOf(slot) == record.priority);
      const Recency::List& list = record.tiers[t];
      uint64_t blocks = 0;
      for (const Block* block = At(list.first); block != nullptr; block = At(block->next), blocks++)
        KVTIDE_CHECK(block->place != nullptr && block->place->tier == static_cast<int>(t) &&
                     block->account() == tier.policy->TenantOf(slot) && &Root(*block) == &record &&
                     (block->next != kNoSlot || At(list.last) == block));
      KVTIDE_CHECK(blocks == list.blocks && blocks > 0);
      in_policy[t] += blocks;
      if (record.readers > 0) read[t] += blocks;
      return true;
    });
    size_t end = 0, placed = 0;
    for (const auto& [offset, place] : tier.places) {
      KVTIDE_CHECK(place->offset == offset && offset >= end, "places overlap at ", offset);
      end = offset + place->extent();
      placed += place->extent();
    }
    KVTIDE_CHECK(placed == tier.allocator.used_bytes() && tier.places.size() == tier.blocks);
    KVTIDE_CHECK(in_policy[t] == linked[t] && read[t] == tier.read, "tier ", tier.name, ": ", in_policy[t],
                 " in the policy, ", linked[t], " blocks; ", read[t], " being read, ", tier.read, " counted");
  }
}

void BlockStore::CheckChunk(const Chunk& chunk) const {
  int count = 0, sole = 0, dropped = 0, degraded = 0;
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
    if (block->kind->IsDegraded()) degraded++;
    tiers[static_cast<size_t>(block->place->tier)].blocks++;
    tiers[static_cast<size_t>(block->place->tier)].bytes += block->bytes();
  }
  KVTIDE_CHECK(chunk.owners > 0 && chunk.keepers <= chunk.owners && count == chunk.count &&
                   sole == chunk.sole && dropped == chunk.dropped && degraded == chunk.degraded,
               "a chunk counts ", chunk.count, " entries, ", chunk.sole, " of its own, ", chunk.dropped,
               " dropped; there are ", count, ", ", sole, ", ", dropped);
  for (size_t t = 0; t < tiers.size(); t++)
    KVTIDE_CHECK(tiers[t].blocks == chunk.tiers[t].blocks && tiers[t].bytes == chunk.tiers[t].bytes);
}

}  // namespace kvtide
