#include "daemon/cache/block/keyed_index.h"

#include <xxhash.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "kernels/base/check.h"

namespace kvtide {

BlockKey HashKey(NamespaceId space, std::string_view key) {
  const XXH128_hash_t hash = XXH3_128bits_withSeed(key.data(), key.size(), space);
  return {hash.low64, hash.high64};
}

Place* KeptPlace(const BlockStore& store, const Block& block) {
  KVTIDE_CHECK(block.durable);
  if (block.has_backup) return store.Backup(block);
  KVTIDE_CHECK(block.place != nullptr && block.place->keeps() > 0);
  return block.place;
}

KeyedIndex::KeyedIndex(BlockStore* store) : store_(store) {
  store->SetForget([this](Block* block) { Forget(block); });
  store->SetRecoded([this](const Block& block, const BlockKind& before) { Recoded(block, before); });
}

absl::StatusOr<NamespacePtr> KeyedIndex::Find(NamespaceId id, const Identity& caller) const {
  const auto found = namespaces_.find(id);
  if (found != namespaces_.end() && caller.MaySee(found->second->spec.tenant)) return found->second;
  const absl::Status unknown = absl::NotFoundError(
      absl::StrCat("namespace ", id, " is unknown or was deleted; open it (OpenNamespace)"));
  return found == namespaces_.end() ? unknown : Refused(Refusal::kOtherTenant, unknown);
}

void KeyedIndex::Enter(const NamespacePtr& space) {
  const bool added = namespaces_.emplace(space->id, space).second;
  KVTIDE_CHECK(added);
}

void KeyedIndex::SetPersistence(KeyedNamespace& space, Persistence persistence) {
  if (space.persistence == persistence) return;
  space.persistence = persistence;
  space.fresh.clear();
  if (persistence != Persistence::kAll) return;
  space.blocks.ForEach([&](const Block* block) {
    if (!block->durable) space.fresh.push_back(block->id);
  });
  // The map has no order that a second run would have.
  std::sort(space.fresh.begin(), space.fresh.end());
}

void KeyedIndex::SetPriority(KeyedNamespace& space, Priority priority) {
  const Priority former = std::exchange(space.priority, priority);
  if (former == priority) return;
  // Records of blocks that were stored or found together are of one namespace. The one that was used last is
  // the hottest of the new priority; the index has no order that a second run would have.
  std::set<RecordSlot> seen;
  std::map<uint64_t, RecencyPtr> records;  // by their last use
  space.blocks.ForEach([&](const Block* block) {
    if (block->record == kNoSlot || !seen.insert(block->record).second) return;
    if (store_->PriorityOf(*block) == former) records[store_->TouchSerial(*block)] = store_->RecordOf(*block);
  });
  for (const auto& [serial, record] : records) store_->SetPriority(record, priority);
}

void KeyedIndex::Insert(KeyedNamespace& space, const BlockKey& key, Block* block) {
  KVTIDE_CHECK(space.blocks.Find(key) == nullptr && !space.deleted && !block->keyed && space.Has(*block));
  block->keyed = true;
  block->key = key;
  BlockKind kind = *block->kind;
  kind.model_hash = kind.name_space_hash = space.id;
  kind.stamped_with_key = true;
  kind.ladder = space.ladder;
  store_->SetKind(block, kind);
  space.degraded += block->kind->IsDegraded();
  space.blocks.Insert(*block);
  store_->AddDirect(block, false);
  if (space.persistence == Persistence::kAll) space.fresh.push_back(block->id);
  blocks_++;
  bytes_ += block->bytes();
}

void KeyedIndex::ForgetDurable(KeyedNamespace& space, Block* block) {
  if (!block->durable) return;
  Place* const place = KeptPlace(*store_, *block);
  block->durable = false;
  if (const auto shard = space.durable.find(block->id); shard != space.durable.end()) {
    shard->second->lost = true;
    space.durable.erase(shard);
  }
  store_->Unkeep(place);
}

void KeyedIndex::Recoded(const Block& block, const BlockKind& before) {
  bytes_ -= before.bytes - block.bytes();
  KeyedNamespace& space = *namespaces_.find(before.name_space_hash)->second;
  space.degraded += block.kind->IsDegraded() && !before.IsDegraded();
}

void KeyedIndex::Forget(Block* block) {
  KVTIDE_CHECK(block->keyed);
  block->keyed = false;
  const auto found = namespaces_.find(block->kind->name_space_hash);
  KVTIDE_CHECK(found != namespaces_.end());
  KeyedNamespace& space = *found->second;
  ForgetDurable(space, block);
  const bool erased = space.blocks.Erase(*block);
  KVTIDE_CHECK(erased);
  space.dropped++;
  space.degraded -= block->kind->IsDegraded();
  blocks_--;
  bytes_ -= block->bytes();
}

uint64_t KeyedIndex::Delete(const NamespacePtr& space) {
  space->deleted = true;
  for (auto lease = leases_.begin(); lease != leases_.end();) {
    const auto next = std::next(lease);
    if (lease->second.space == space) End(lease);
    lease = next;
  }
  const uint64_t count = space->blocks.size();
  std::vector<Block*> blocks;
  blocks.reserve(count);
  space->blocks.ForEach([&](Block* block) { blocks.push_back(block); });
  // The map has no order that a second run would have.
  std::sort(blocks.begin(), blocks.end(), [](const Block* a, const Block* b) { return a->id < b->id; });
  for (Block* const block : blocks) {
    ForgetDurable(*space, block);
    block->keyed = false;
    blocks_--;
    bytes_ -= block->bytes();
    store_->RemoveDirect(block, false);
  }
  space->blocks.clear();
  space->degraded = 0;
  space->newest = {};
  namespaces_.erase(space->id);
  return count;
}

void KeyedIndex::Grant(LeaseId id, const NamespacePtr& space, absl::Time end, std::vector<HeldBlock> blocks) {
  space->leases++;
  Enter(id, {space, nullptr, end, std::move(blocks)});
}

void KeyedIndex::Grant(LeaseId id, std::shared_ptr<const PrefixHold> prefix, absl::Time end,
                       std::vector<HeldBlock> blocks) {
  Enter(id, {nullptr, std::move(prefix), end, std::move(blocks)});
}

void KeyedIndex::Enter(LeaseId id, KeyedLease lease) {
  for (const HeldBlock& block : lease.blocks) block->leases++;
  ends_.emplace(lease.end, id);
  const bool added = leases_.emplace(id, std::move(lease)).second;
  KVTIDE_CHECK(added);
}

KeyedLease* KeyedIndex::FindLease(LeaseId id) {
  const auto found = leases_.find(id);
  return found != leases_.end() ? &found->second : nullptr;
}

void KeyedIndex::End(std::map<LeaseId, KeyedLease>::iterator lease) {
  for (const HeldBlock& block : lease->second.blocks) {
    KVTIDE_CHECK(block->leases > 0);
    block->leases--;
  }
  if (lease->second.space != nullptr) lease->second.space->leases--;
  ends_.erase({lease->second.end, lease->first});
  leases_.erase(lease);
}

bool KeyedIndex::Release(LeaseId id) {
  const auto found = leases_.find(id);
  if (found == leases_.end()) return false;
  End(found);
  return true;
}

uint64_t KeyedIndex::ExpireLeases(absl::Time now) {
  uint64_t count = 0;
  while (!ends_.empty() && ends_.begin()->first <= now) {
    End(leases_.find(ends_.begin()->second));
    count++;
  }
  expired_ += count;
  return count;
}

void KeyedIndex::Clear() {
  while (!leases_.empty()) End(leases_.begin());
  for (auto& [id, space] : namespaces_) {
    std::vector<Block*> blocks;
    space->blocks.ForEach([&](Block* block) { blocks.push_back(block); });
    for (Block* const block : blocks) {
      ForgetDurable(*space, block);
      block->keyed = false;
      store_->RemoveDirect(block, false);
    }
    space->blocks.clear();
    space->newest = {};
  }
  namespaces_.clear();
  blocks_ = bytes_ = 0;
}

void KeyedIndex::CheckInvariants() const {
  uint64_t blocks = 0, bytes = 0;
  std::map<const Block*, int> leased;
  for (const auto& [id, space] : namespaces_) {
    KVTIDE_CHECK(id == space->id && !space->deleted);
    uint64_t durable = 0, degraded = 0;
    space->blocks.ForEach([&, &id = id, &space = space](const Block* block) {
      KVTIDE_CHECK(block->keyed && block->place != nullptr && space->blocks.Find(block->key) == block &&
                   block->kind->name_space_hash == id && block->kind->stamped_with_key &&
                   space->Has(*block) && block->kind->ladder == space->ladder);
      degraded += block->kind->IsDegraded();
      if (block->durable) {
        KVTIDE_CHECK(space->durable.count(block->id) == 1 && KeptPlace(*store_, *block)->keeps() > 0);
        durable++;
      }
      blocks++;
      bytes += block->bytes();
    });
    KVTIDE_CHECK(degraded == space->degraded, "namespace ", id, ": ", degraded, " degraded blocks, ",
                 space->degraded, " counted");
    KVTIDE_CHECK(durable == space->durable.size(), "namespace ", id, ": ", durable, " durable blocks, ",
                 space->durable.size(), " counted");
  }
  KVTIDE_CHECK(blocks == blocks_ && bytes == bytes_, blocks, " blocks of ", bytes,
               " bytes are found by key, ", blocks_, " of ", bytes_, " counted");
  for (const auto& [id, lease] : leases_) {
    KVTIDE_CHECK(ends_.count({lease.end, id}) == 1 && (lease.space == nullptr || !lease.space->deleted));
    for (const HeldBlock& block : lease.blocks) leased[block.get()]++;
  }
  KVTIDE_CHECK(ends_.size() == leases_.size());
  store_->ForEach([&](const Block& block) {
    const auto found = leased.find(&block);
    KVTIDE_CHECK(block.leases == (found == leased.end() ? 0 : found->second), "block ", block.id, " has ",
                 block.leases, " leases");
  });
}

}  // namespace kvtide
