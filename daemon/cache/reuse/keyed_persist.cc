// Persister: blocks that are found by key over a restart.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/cache/persist/keyed_manifest.h"
#include "daemon/cache/persist/persister.h"
#include "daemon/cache/reuse/keyed_store.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

// One call makes a namespace durable at a time.
class PersistingMark {
 public:
  PersistingMark(CacheLock& lock, KeyedNamespace& space) : lock_(lock), space_(space) {
    space.persisting = true;
  }
  ~PersistingMark() {
    space_.persisting = false;
    lock_->changed.NotifyAll();
  }

 private:
  CacheLock& lock_;
  KeyedNamespace& space_;
};

// KeyedManifestBlock::rung.
uint8_t RungOf(const KeyedNamespace& space, const Block& block) {
  if (!block.kind->IsDegraded()) return 0;
  const std::vector<CachePair>& degrade = space.spec.degrade;
  const auto rung = std::find(degrade.begin(), degrade.end(), block.layout()->pair());
  return static_cast<uint8_t>(rung - degrade.begin() + 1);
}

}  // namespace

absl::StatusOr<NamespacePersistReport> Persister::PersistNamespace(NamespaceId id,
                                                                   const CallContext& context) {
  if (index_ == nullptr)
    return absl::FailedPreconditionError(
        "no tier survives a restart; give the cache one (kvtided --disk PATH:SIZE)");
  const CacheOptions& options = core_.options();
  CacheLock lock(core_);
  KVTIDE_ASSIGN_OR_RETURN(const NamespacePtr space, lock->keyed.Find(id, *context.identity));
  const absl::Time last = options.clock() + options.io_wait;
  while (space->persisting) {
    KVTIDE_RETURN_IF_ERROR(context.Check(options.clock(), "the call, before it was its turn"));
    if (options.clock() >= last || options.room_wait <= absl::ZeroDuration())
      return absl::AbortedError("another call makes it durable; try again");
    lock.WaitForChange(options.room_wait);
  }
  if (space->deleted) return absl::NotFoundError("the namespace was deleted meanwhile");
  lock->counters.persist_calls++;
  const PersistingMark mark(lock, *space);
  std::vector<BlockId> ids;
  space->blocks.ForEach([&](const Block* block) {
    if (!block->durable) ids.push_back(block->id);
  });
  std::sort(ids.begin(), ids.end());  // the map has no order that a second run would have
  NamespacePersistReport report;
  const absl::Status written = PersistBlocks(lock, space, std::move(ids), context, &report);
  const absl::Status named = WriteShards(lock, space, ~size_t{0});
  if (space->deleted) {
    KVTIDE_RETURN_IF_ERROR(EraseShards(lock, space->shards));
    return absl::NotFoundError("the namespace was deleted meanwhile");
  }
  KVTIDE_RETURN_IF_ERROR(written);
  KVTIDE_RETURN_IF_ERROR(named);
  report.durable_blocks = space->durable.size();
  return report;
}

// Puts the blocks, as far as they are there still, into the durable tier and into shards.
absl::Status Persister::PersistBlocks(CacheLock& lock, const NamespacePtr& space, std::vector<BlockId> ids,
                                      const CallContext& context, NamespacePersistReport* report) {
  const CacheOptions& options = core_.options();
  BlockStore& store = lock->store;
  const uint64_t before_serial = store.serial() + 1;
  const absl::Time last = options.clock() + options.io_wait;
  PersistReport written;
  absl::Status status;
  for (size_t next = 0; next < ids.size() && status.ok() && !space->deleted;) {
    status = context.Check(options.clock(), "the call, while blocks were written");
    if (!status.ok()) break;
    std::vector<HeldBlock> batch, to_write;
    size_t bytes = 0;
    const Block* moving = nullptr;
    for (; next < ids.size() && batch.size() < options.max_moves_in_flight; next++) {
      Block* const block = store.Get(ids[next]);
      if (block == nullptr || !block->keyed || block->durable || block->writing) continue;
      if (block->moving) {
        moving = block;
        break;
      }
      batch.emplace_back(store, block);
      if (DurablePlace(store, *block) != nullptr) continue;
      to_write.emplace_back(store, block);
      bytes += store.tier(tier_).ExtentBytes(block->bytes());
    }
    if (batch.empty()) {
      if (moving == nullptr) break;
      if (options.clock() >= last || options.room_wait <= absl::ZeroDuration()) {
        status = absl::AbortedError("a block is being moved for too long; try again");
        break;
      }
      lock.WaitForChange(options.room_wait);
      continue;
    }
    std::vector<PinnedPlace> pins;
    if (!to_write.empty()) {
      constexpr int kRounds = 64;
      const Tier& tier = store.tier(tier_);
      for (int round = 0; round < kRounds && tier.allocator.free_bytes() < bytes; round++)
        if (!room_.MakeRoom(lock, tier_, space->form.bytes, bytes, before_serial)) break;
      // The mutex was free: some may be gone, on their way, or there by now.
      std::erase_if(to_write, [&](const HeldBlock& block) {
        return !block->keyed || block->moving || block->writing ||
               DurablePlace(store, *block.get()) != nullptr;
      });
      status = WriteBatch(lock, to_write, context, &pins, &written);
    }
    for (const HeldBlock& held : batch) {
      Block* const block = held.get();
      Place* const place = DurablePlace(store, *block);
      if (!block->keyed || block->durable) continue;
      if (place == nullptr || block->moving) {  // it went up meanwhile: once more
        if (status.ok()) ids.push_back(block->id);
        continue;
      }
      store.Keep(place);
      block->durable = true;
      if (space->shards.empty() || space->shards.back()->blocks.size() >= kMostShardBlocks) {
        space->shards.push_back(std::make_unique<KeyedShard>());
        space->shards.back()->id = lock->sequences.NewId();
      }
      KeyedShard& shard = *space->shards.back();
      shard.blocks.push_back(block->id);
      shard.gained = true;
      space->durable[block->id] = &shard;
    }
  }
  report->blocks += written.blocks;
  report->bytes += written.bytes;
  return status;
}

absl::Status Persister::WriteShards(CacheLock& lock, const NamespacePtr& space, size_t lost) {
  absl::Status first;
  // A shard may be added meanwhile, never taken away by others: one call persists a namespace at a time.
  for (size_t s = 0; s < space->shards.size() && !space->deleted; s++) {
    KeyedShard& shard = *space->shards[s];
    if (!shard.gained && (!shard.lost || lost == 0)) continue;
    if (!shard.gained) lost--;
    KeyedManifest manifest;
    last_written_ = std::max(last_written_ + 1, absl::ToUnixNanos(core_.options().clock()));
    manifest.written_at = last_written_;
    manifest.id = space->id;
    manifest.spec = space->spec;
    manifest.persistence = space->persistence;
    std::vector<BlockId> blocks;
    for (const BlockId id : shard.blocks) {
      const auto owner = space->durable.find(id);
      if (owner == space->durable.end() || owner->second != &shard) continue;
      const Block* const block = lock->store.Get(id);
      const Place* const place = KeptPlace(lock->store, *block);
      manifest.blocks.push_back({block->key, place->offset, place->Written().write_id,
                                 place->Written().checksum, RungOf(*space, *block)});
      blocks.push_back(id);
    }
    shard.blocks = std::move(blocks);
    shard.gained = shard.lost = false;
    const uint64_t id = shard.id;
    const std::string bytes = EncodeKeyedManifest(manifest);
    absl::Status status;
    if (manifest.blocks.empty()) {
      const Unlocked unlocked(lock);
      status = index_->Erase({&id, 1});
    } else {
      status = Write(lock, id, bytes);
    }
    if (status.ok()) {
      lock->counters.persisted++;
    } else {
      lock->counters.FailPersist(absl::StrCat("a list of blocks of namespace ", space->id), status);
      shard.gained = true;
      if (first.ok()) first = std::move(status);
    }
  }
  if (space->deleted) return first;
  std::erase_if(space->shards, [](const std::unique_ptr<KeyedShard>& shard) {
    return shard->blocks.empty() && !shard->gained && !shard->lost;
  });
  return first;
}

void Persister::PersistNamespaces(CacheLock& lock) {
  constexpr size_t kLostAtOnce =
      8;  // shards: each costs a few syncs, and what they name too much does no harm
  EraseShards(lock, {}).IgnoreError();  // as below: counted where it fails, and tried again
  std::vector<NamespacePtr> spaces;
  for (const auto& [id, space] : lock->keyed.namespaces()) spaces.push_back(space);
  for (const NamespacePtr& space : spaces) {
    if (space->persisting || space->deleted) continue;
    const PersistingMark mark(lock, *space);
    std::vector<BlockId> fresh = std::exchange(space->fresh, {});
    const std::vector<BlockId> again = fresh;
    NamespacePersistReport report;
    absl::Status status = PersistBlocks(lock, space, std::move(fresh), {}, &report);
    if (!status.ok()) lock->counters.FailPersist(absl::StrCat("blocks of namespace ", space->id), status);
    WriteShards(lock, space, kLostAtOnce).IgnoreError();
    if (space->deleted) {
      EraseShards(lock, space->shards).IgnoreError();
      continue;
    }
    if (status.ok()) continue;
    for (const BlockId id : again)
      if (const Block* block = lock->store.Get(id); block != nullptr && block->keyed && !block->durable)
        space->fresh.push_back(id);
  }
}

absl::Status Persister::ForgetNamespace(KeyedNamespace& space) {
  if (index_ == nullptr) return absl::OkStatus();
  const CacheOptions& options = core_.options();
  CacheLock lock(core_);
  // What is being written now is there after that.
  const absl::Time last = options.clock() + options.io_wait;
  while (space.persisting && options.clock() < last && options.room_wait > absl::ZeroDuration())
    lock.WaitForChange(options.room_wait);
  return EraseShards(lock, space.shards);
}

absl::Status Persister::EraseShards(CacheLock& lock, std::span<const std::unique_ptr<KeyedShard>> shards) {
  std::vector<uint64_t> keys = std::exchange(unerased_shards_, {});
  for (const auto& shard : shards) keys.push_back(shard->id);
  if (keys.empty()) return absl::OkStatus();
  absl::Status status;
  {
    const Unlocked unlocked(lock);
    status = index_->Erase(keys);
  }
  if (!status.ok()) {
    unerased_shards_.insert(unerased_shards_.end(), keys.begin(), keys.end());
    lock->counters.FailPersist("a namespace that was deleted", status);
  }
  return Annotate(status, "the namespace is deleted, but may be there again after a restart");
}

absl::Status Persister::RestoreShard(CacheLock& lock, uint64_t id, const std::string& bytes,
                                     RestoreReport* report, Returned* returned) {
  KVTIDE_ASSIGN_OR_RETURN(const KeyedManifest manifest, DecodeKeyedManifest(bytes));
  BlockStore& store = lock->store;
  last_written_ = std::max(last_written_, manifest.written_at);
  const size_t before = lock->keyed.namespaces().size();
  KVTIDE_ASSIGN_OR_RETURN(const NamespacePtr space, KeyedStore::Make(lock, manifest.spec));
  if (lock->keyed.namespaces().size() > before) {
    lock->keyed.SetPersistence(*space, manifest.persistence);
    report->namespaces++;
  }
  auto shard = std::make_unique<KeyedShard>();
  shard->id = id;
  for (const KeyedManifestBlock& from : manifest.blocks) {
    const BlockForm form = from.rung == 0 ? space->form
                                          : lock->sequences.Layout(space->spec.stored_shape(),
                                                                   space->spec.degrade[from.rung - 1]);
    const bool known = from.rung == 0 || (space->ladder != nullptr && space->ladder->Has(form.layout));
    Block* const block =
        !known || space->blocks.contains(from.key) || lock->keyed.blocks() >= core_.options().max_keyed_blocks
            ? nullptr
            : store.AllocateAt(tier_, from.offset, 0, form);
    if (block == nullptr) {  // stored anew since, or its place is another's
      shard->lost = true;
      continue;
    }
    const WritingBlock guard(store, block);
    block->has_checksum = true;
    block->checksum = from.checksum;
    block->place->Written().write_id = from.write_id;
    block->place->Written().checksum = from.checksum;
    block->checked = false;
    store.SetAccount(block, space->account);
    lock->keyed.Insert(*space, from.key, block);
    returned->blocks.push_back(block);
    store.Keep(block->place);
    block->durable = true;
    shard->blocks.push_back(block->id);
    space->durable[block->id] = shard.get();
    report->keyed_blocks++;
  }
  space->fresh.clear();
  space->shards.push_back(std::move(shard));
  return absl::OkStatus();
}

}  // namespace kvtide
