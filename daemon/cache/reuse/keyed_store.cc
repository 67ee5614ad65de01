#include "daemon/cache/reuse/keyed_store.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "daemon/cache/block/priority_records.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/move/label_check.h"
#include "daemon/cache/move/move_batch.h"
#include "daemon/cache/move/room_text.h"
#include "daemon/cache/reuse/keyed_payload.h"
#include "kernels/base/check.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint64_t kSharedRecord =
    1024;  // blocks that go by one record, where calls follow each other quickly
constexpr absl::Duration kTogether = absl::Seconds(1);

const CallContext& ContextOf(const CallContext* context) {
  static const CallContext kNobody;
  return context != nullptr ? *context : kNobody;
}

absl::Status DeletedError(const KeyedNamespace& space) {
  return absl::NotFoundError(absl::StrCat("namespace ", space.id, " was deleted meanwhile"));
}

// Tells whoever records it what the namespace was asked.
void Trace(const CacheOptions& options, TraceVerb verb, const KeyedNamespace& space,
           std::span<const BlockKey> keys, uint64_t there = 0) {
  if (options.trace == nullptr) return;
  options.trace->Record({options.clock(), verb, space.id, static_cast<uint32_t>(space.spec.block_tokens),
                         space.form.bytes, there, keys});
}

absl::Status LostError(std::span<const uint64_t> lost) {
  return absl::DataLossError(
      absl::StrCat(lost.size(), lost.size() == 1 ? " block" : " blocks",
                   " of the lease cannot be read any more, the first is ", lost.front(),
                   ": nothing was loaded; compute from there on, or ask with allow_lost"));
}

}  // namespace

LeaseId KeyedStore::NewLeaseId(CacheState& state) {
  LeaseId id = 0;
  while (id == 0 || state.keyed.FindLease(id) != nullptr) id = state.sequences.RandomId();
  return id;
}

// Namespaces.
absl::StatusOr<NamespacePtr> KeyedStore::Make(CacheLock& lock, const NamespaceSpec& spec) {
  const NamespaceId id = HashNamespaceSpec(spec);
  const auto& all = lock->keyed.namespaces();
  if (const auto found = all.find(id); found != all.end()) {
    if (found->second->spec == spec) return found->second;
    return absl::FailedPreconditionError("another namespace has the same hash; use another salt");
  }
  const CacheOptions& options = lock.core().options();
  if (all.size() >= options.max_namespaces)
    return Refused(
        Refusal::kLimit,
        absl::ResourceExhaustedError(absl::StrCat(
            all.size(),
            " namespaces are open, which is the limit (max_namespaces); delete one (DeleteNamespace)")));
  auto space = std::make_shared<KeyedNamespace>(&lock->store);
  space->id = id;
  space->spec = spec;
  space->account = lock->tenants.Get(spec.tenant);
  if (spec.opaque.has_value()) {
    space->form = BlockForm::Opaque(spec.opaque->block_bytes);
  } else {
    const BlockLayout* const coded = lock->sequences.Layout(spec.stored_shape(), spec.tensors->pair);
    space->form = coded;
    space->exact = lock->sequences.Layout(spec.stored_shape(), ExactPair());
    for (const TierOptions& tier : options.tiers) {
      if (!tier.attends()) continue;
      KVTIDE_RETURN_IF_ERROR(Annotate(tier.backend->CheckSupport(*coded), "namespace"));
      KVTIDE_RETURN_IF_ERROR(Annotate(tier.backend->CheckSupport(*space->exact), "namespace"));
      for (const CachePair& rung : spec.degrade)
        KVTIDE_RETURN_IF_ERROR(
            Annotate(tier.backend->CheckSupport(*lock->sequences.Layout(spec.stored_shape(), rung)),
                     "namespace: degrade"));
    }
    space->ladder = lock->sequences.LadderOf(spec.stored_shape(), spec.tensors->pair, spec.degrade);
  }
  lock->keyed.Enter(space);
  return space;
}

NamespaceInfo KeyedStore::Describe(const KeyedNamespace& space) {
  NamespaceInfo info;
  info.id = space.id;
  info.spec = space.spec;
  info.block_bytes = space.form.bytes;
  if (space.form.layout != nullptr) {
    info.codec_version_k = Info(space.form.layout->pair().k).version;
    info.codec_version_v = Info(space.form.layout->pair().v).version;
  }
  info.persistence = space.persistence;
  info.priority = space.priority;
  info.blocks = space.blocks.size();
  info.degraded_blocks = space.degraded;
  info.durable_blocks = space.durable.size();
  info.leases = space.leases;
  info.hits = space.hits;
  info.misses = space.misses;
  info.stored_blocks = space.stored;
  info.present_blocks = space.present;
  info.loaded_blocks = space.loaded;
  info.dropped_blocks = space.dropped;
  return info;
}

absl::StatusOr<NamespaceInfo> KeyedStore::Open(const NamespaceSpec& spec, Persistence persistence,
                                               Priority priority) {
  KVTIDE_RETURN_IF_ERROR(CheckNamespaceSpec(spec));
  CacheLock lock(core_);
  const uint64_t before = lock->keyed.namespaces().size();
  const absl::StatusOr<NamespacePtr> space = Make(lock, spec);
  if (absl::IsResourceExhausted(space.status())) lock->counters.exhausted++;
  KVTIDE_RETURN_IF_ERROR(space.status());
  lock->keyed.SetPersistence(**space,
                             persistence == Persistence::kAll ? Persistence::kAll : Persistence::kNone);
  lock->keyed.SetPriority(**space, priority);
  NamespaceInfo info = Describe(**space);
  info.existed = lock->keyed.namespaces().size() == before;
  return info;
}

absl::StatusOr<NamespaceInfo> KeyedStore::Get(NamespaceId id, const CallContext& context) {
  CacheLock lock(core_);
  KVTIDE_ASSIGN_OR_RETURN(const NamespacePtr space, lock->keyed.Find(id, *context.identity));
  return Describe(*space);
}

std::vector<NamespaceInfo> KeyedStore::List(const CallContext& context) {
  CacheLock lock(core_);
  lock->keyed.ExpireLeases(core_.options().clock());
  std::vector<NamespaceInfo> infos;
  for (const auto& [id, space] : lock->keyed.namespaces())
    if (context.identity->MaySee(space->spec.tenant)) infos.push_back(Describe(*space));
  return infos;
}

absl::StatusOr<NamespacePtr> KeyedStore::Delete(NamespaceId id, const CallContext& context,
                                                uint64_t* blocks) {
  CacheLock lock(core_);
  KVTIDE_ASSIGN_OR_RETURN(const NamespacePtr space, lock->keyed.Find(id, *context.identity));
  *blocks = lock->keyed.Delete(space);
  remote_.BeginErase(lock, *space);
  lock->changed.NotifyAll();
  return space;
}

absl::StatusOr<std::vector<BlockKey>> KeyedStore::Keys(NamespaceId space,
                                                       std::span<const std::string_view> keys) const {
  std::vector<BlockKey> hashed;
  hashed.reserve(keys.size());
  for (const std::string_view key : keys) {
    if (key.empty() || key.size() > kMostKeyBytes)
      return absl::InvalidArgumentError(absl::StrCat("keys[", hashed.size(), "] has ", key.size(),
                                                     " bytes, must have 1 to ", kMostKeyBytes));
    hashed.push_back(HashKey(space, key));
  }
  return hashed;
}

// Stores.

// A lease of the call's own: what it has stored may move, but is not dropped for the rest of it.
class KeyedStore::StoringLease {
 public:
  StoringLease(CacheLock& lock, const NamespacePtr& space) : lock_(lock), id_(NewLeaseId(*lock)) {
    lock->keyed.Grant(id_, space, absl::InfiniteFuture(), {});
  }
  ~StoringLease() { lock_->keyed.Release(id_); }
  StoringLease(const StoringLease&) = delete;
  StoringLease& operator=(const StoringLease&) = delete;
  void Add(Block* block) const {
    KeyedLease* const lease = lock_->keyed.FindLease(id_);
    block->leases++;
    lease->blocks.emplace_back(lock_->store, block);
  }

 private:
  CacheLock& lock_;
  const LeaseId id_;
};

struct KeyedStore::Write {
  size_t index = 0;  // in the call
  WritingBlock block;
  PinnedPlace place;
  uint64_t checksum = 0;
  absl::Status status;
};

WritingBlock KeyedStore::Allocate(CacheLock& lock, const KeyedNamespace& space, uint64_t want_bytes,
                                  bool* over_quota) {
  return room_.AllocateCached(lock, space.account, RoomiestHome(lock->store), space.form, want_bytes,
                              over_quota);
}

bool KeyedStore::DropColdest(CacheState& state) const {
  BlockStore& store = state.store;
  for (int t = static_cast<int>(store.tiers()) - 1; t >= 0; t--) {
    BlockId coldest = 0;
    bool found = false;
    store.PeekIdle(t, ~uint64_t{0}, [&](const Block& block) {
      if (!block.keyed || !block.droppable()) return true;
      coldest = block.id;
      found = true;
      return false;
    });
    if (!found) continue;
    store.Drop(store.Get(coldest));
    state.counters.dropped_blocks++;
    return true;
  }
  return false;
}

// A call under way.
struct KeyedStore::Storing {
  const CallContext& context;
  std::span<const BlockKey> keys;
  NamespacePtr space;
  KeyedPayload payload;
  Priority priority;
  RecencyPtr record;
  RecencyPtr returned;  // of blocks that were dropped not long ago; null: none so far
  size_t next = 0;      // of the keys
  bool full = false;    // the rest finds no room,
  Refusal why = Refusal::kNoRoom;
  StoreReport report;
};

void KeyedStore::Copies(size_t count, size_t bytes, bool side_by_side,
                        const std::function<bool(size_t)>& copy) {
  constexpr size_t kWorthAThread = size_t{512} << 10;  // waking one takes as long as copying a part of this
  const size_t processors = std::max(1u, std::thread::hardware_concurrency());
  const size_t most = side_by_side ? std::min(core_.options().max_copy_threads, processors) : 1;
  const size_t threads = std::clamp<size_t>(std::min(count * bytes / kWorthAThread, count), 1, most);
  std::atomic<size_t> next = 0;
  std::atomic<bool> stop = false;
  const auto work = [&] {
    while (!stop.load(std::memory_order_relaxed)) {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      if (!copy(i)) stop.store(true, std::memory_order_relaxed);
    }
  };
  const std::vector<std::function<void()>> parts(threads, work);
  copiers_.Run(parts);
}

absl::StatusOr<std::vector<KeyedStore::Write>> KeyedStore::Reserve(CacheLock& lock, Storing& storing) {
  const CacheOptions& options = core_.options();
  const KeyedNamespace& space = *storing.space;
  StoreReport& report = storing.report;
  std::vector<Write> writes;
  absl::flat_hash_set<BlockKey> in_batch;
  for (; storing.next < storing.keys.size() && writes.size() < options.max_moves_in_flight; storing.next++) {
    if (space.deleted) return DeletedError(space);
    const BlockKey& key = storing.keys[storing.next];
    if (Block* const there = space.blocks.Find(key); there != nullptr || in_batch.contains(key)) {
      report.present++;
      // Blocks of its record may be less important to whoever stored them.
      if (there != nullptr && there->chunks.empty() && lock->store.PriorityOf(*there) < storing.priority)
        lock->store.Rejoin(there, storing.record, BlockStore::End::kColdest);
      continue;
    }
    if (!storing.full && lock->keyed.blocks() + writes.size() >= options.max_keyed_blocks &&
        !DropColdest(*lock)) {
      storing.full = true;
      storing.why = Refusal::kLimit;
      report.problem = absl::StrCat("there are ", lock->keyed.blocks(),
                                    " blocks that are found by key, which is the limit (max_keyed_blocks)");
    }
    Write write;
    write.index = storing.next;
    if (!storing.full) {
      bool over_quota = false;
      write.block =
          Allocate(lock, space, (storing.keys.size() - storing.next) * space.form.bytes, &over_quota);
      if (!write.block && !writes.empty()) break;  // what is being written makes no way: finish that first
      if (!write.block) {
        storing.full = true;
        storing.why = over_quota ? Refusal::kQuota : Refusal::kNoRoom;
        const absl::Time now = core_.options().clock();
        report.problem = over_quota ? OverQuotaText(*lock, space.form.bytes, *space.account, now)
                                    : NoRoomText(*lock, space.form.bytes, space.account.get(), now);
      }
    }
    if (storing.full) {
      report.left_out++;
      continue;
    }
    in_batch.insert(key);
    write.place = PinnedPlace(lock->store, write.block->place);
    writes.push_back(std::move(write));
  }
  return writes;
}

void KeyedStore::CopyIn(CacheLock& lock, Storing& storing, std::span<Write> writes) {
  const Unlocked unlocked(lock);
  Copies(writes.size(), storing.space->form.bytes, storing.payload.side_by_side(), [&](size_t i) {
    Write& write = writes[i];
    const int tier = write.place->tier;
    const bool checksum = core_.options().tiers[static_cast<size_t>(tier)].checksum;
    write.status =
        storing.payload.Write(core_.backend(tier), tier, write.index, core_.Data(*write.place.get()),
                              checksum ? &write.checksum : nullptr, storing.context.cancellation);
    return true;  // each block stands for itself
  });
}

absl::Status KeyedStore::Enter(CacheLock& lock, Storing& storing, const StoringLease& lease,
                               std::span<Write> writes) {
  BlockStore& store = lock->store;
  KeyedNamespace& space = *storing.space;
  if (space.deleted) return DeletedError(space);
  absl::Status failed;
  for (Write& write : writes) {
    if (!write.status.ok()) {
      if (failed.ok()) failed = write.status;
      continue;
    }
    const BlockKey& key = storing.keys[write.index];
    if (space.blocks.contains(key)) {  // another call was faster
      storing.report.present++;
      continue;
    }
    Block* const block = write.block.get();
    block->has_checksum = store.tier(block->place->tier).checksum;
    block->checksum = write.checksum;
    lock->keyed.Insert(space, key, block);
    // What was dropped too early is not on trial once more.
    RecencyPtr& record = store.TakeGhost(key) ? storing.returned : storing.record;
    if (record == nullptr)
      record = store.NewRecency(core_.options().clock(), Standing::kUsed, storing.priority);
    store.Join(block, record, BlockStore::End::kColdest);
    lock->unsent.Found(block->id);
    lease.Add(block);
    storing.report.stored++;
  }
  lock->changed.NotifyAll();
  return failed;
}

RecencyPtr KeyedStore::NewestRecord(CacheState& state, KeyedNamespace& space, Priority priority) const {
  BlockStore& store = state.store;
  const absl::Time now = core_.options().clock();
  RecencyPtr& newest = space.newest[static_cast<size_t>(priority)];
  if (newest == nullptr || store.BlocksOf(newest) >= kSharedRecord ||
      now - store.LastTouched(newest) > kTogether || store.PriorityOf(newest) != priority)
    newest = store.NewRecency(now, Standing::kNew, priority);
  // To be stored beside others is no use of these; with LRU it counts as one, as it is all that there is.
  if (core_.options().eviction == EvictionKind::kLru) store.Touch(newest, now);
  return newest;
}

absl::StatusOr<StoreReport> KeyedStore::Store(const StoreCall& call) {
  const CallContext& context = ContextOf(call.context);
  const CacheOptions& options = core_.options();
  if (call.keys.empty()) return absl::InvalidArgumentError("a store without keys");
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<BlockKey> keys, Keys(call.name_space, call.keys));
  NamespacePtr space;
  {
    CacheLock lock(core_);
    lock->keyed.ExpireLeases(options.clock());
    KVTIDE_ASSIGN_OR_RETURN(space, lock->keyed.Find(call.name_space, *context.identity));
  }
  KVTIDE_ASSIGN_OR_RETURN(KeyedPayload payload,
                          KeyedPayload::Incoming(*space, call.form, call.layout, keys.size(), call.payload));
  KVTIDE_RETURN_IF_ERROR(payload.CheckValues());

  CacheLock lock(core_);
  if (space->deleted) return DeletedError(*space);
  Trace(options, TraceVerb::kStore, *space, keys);
  const Priority priority = call.priority.value_or(space->priority);
  Storing storing{context, keys, space, std::move(payload), priority, NewestRecord(*lock, *space, priority),
                  nullptr};
  const StoringLease lease(lock, space);
  absl::Status failed;
  while (storing.next < keys.size() && failed.ok()) {
    KVTIDE_RETURN_IF_ERROR(context.Check(options.clock(), "the store (some blocks may be stored)"));
    KVTIDE_ASSIGN_OR_RETURN(std::vector<Write> writes, Reserve(lock, storing));
    if (writes.empty()) continue;
    CopyIn(lock, storing, writes);
    failed = Enter(lock, storing, lease, writes);
    if (space->deleted) return DeletedError(*space);
  }
  const StoreReport& report = storing.report;
  space->stored += report.stored;
  space->present += report.present;
  lock->counters.keyed_stored += report.stored;
  lock->counters.keyed_present += report.present;
  lock->counters.keyed_left_out += report.left_out;
  KVTIDE_RETURN_IF_ERROR(failed);
  if (report.left_out > 0 && report.stored + report.present == 0) {
    lock->counters.exhausted++;
    return Refused(storing.why, absl::ResourceExhaustedError(report.problem));
  }
  return report;
}

// Lookups.

// Blocks that are used together go by one record from now on, the last one first: what follows them is of no
// use without them.
void KeyedStore::UseTogether(CacheState& state, std::span<Block* const> blocks) const {
  BlockStore& store = state.store;
  const absl::Time now = core_.options().clock();
  if (blocks.empty()) return;
  const RecencyPtr record = store.RecordOf(*blocks.front());
  const bool together = record != nullptr && store.BlocksOf(record) == blocks.size() &&
                        std::all_of(blocks.begin(), blocks.end(),
                                    [&](const Block* block) { return store.GoesBy(*block, record); });
  if (together) return store.Touch(record, now);
  PriorityRecords records(store, now);
  for (Block* const block : blocks)
    if (block->chunks.empty()) store.Rejoin(block, records.Of(*block), BlockStore::End::kColdest);
  records.Touch(now);
}

absl::StatusOr<LookupReport> KeyedStore::Lookup(const LookupCall& call) {
  const CallContext& context = ContextOf(call.context);
  const CacheOptions& options = core_.options();
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<BlockKey> keys, Keys(call.name_space, call.keys));
  CacheLock lock(core_);
  lock->keyed.ExpireLeases(options.clock());
  KVTIDE_ASSIGN_OR_RETURN(const NamespacePtr space, lock->keyed.Find(call.name_space, *context.identity));
  RemoteExchange::Fetched fetched;
  if (!call.peek) fetched = remote_.FetchKeyed(lock, space, keys, context);
  std::vector<Block*> found;
  found.reserve(keys.size());
  for (std::span<const BlockKey> answering = keys; true;) {
    if (space->deleted) return DeletedError(*space);
    found.clear();
    std::vector<HeldBlock> unchecked;
    for (const BlockKey& key : answering) {
      Block* const block = space->blocks.Find(key);
      if (block == nullptr) break;
      found.push_back(block);
      if (!block->checked) unchecked.emplace_back(lock->store, block);
    }
    if (unchecked.empty()) break;
    KVTIDE_RETURN_IF_ERROR(context.Check(options.clock(), "the lookup"));
    CheckLabels(lock, unchecked);
    // What comes before it is found once more: the mutex was free.
    answering = BeforeUnchecked(answering, unchecked);
  }
  if (call.lease > absl::ZeroDuration() && !found.empty() && lock->keyed.leases() >= options.max_leases) {
    lock->counters.exhausted++;
    return Refused(Refusal::kLimit,
                   absl::ResourceExhaustedError(absl::StrCat(
                       lock->keyed.leases(),
                       " leases are held, which is the limit (max_leases); release some (ReleaseLease)")));
  }
  LookupReport report;
  report.hits = found.size();
  for (size_t i = 0; i < found.size(); i++) {
    const Block* const block = found[i];
    if (report.tiers.empty() || report.tiers.back().tier != block->place->tier)
      report.tiers.push_back({block->place->tier, 0});
    report.tiers.back().blocks++;
    if (block->kind->IsDegraded()) report.degraded.push_back(i);
  }
  if (call.peek) return report;
  Trace(options, TraceVerb::kLookup, *space, keys, report.hits);
  UseTogether(*lock, found);
  space->hits += report.hits;
  space->misses += keys.size() - report.hits;
  lock->counters.keyed_hits += report.hits;
  lock->counters.keyed_misses += keys.size() - report.hits;
  if (call.lease <= absl::ZeroDuration() || found.empty()) return report;
  std::vector<HeldBlock> held;
  held.reserve(found.size());
  for (Block* const block : found) held.emplace_back(lock->store, block);
  report.lease = NewLeaseId(*lock);
  lock->keyed.Grant(report.lease, space, options.clock() + call.lease, std::move(held));
  lock->counters.leases_granted++;
  return report;
}

bool KeyedStore::Release(LeaseId id, const CallContext& context) {
  CacheLock lock(core_);
  lock->keyed.ExpireLeases(core_.options().clock());
  const KeyedLease* const lease = lock->keyed.FindLease(id);
  if (lease == nullptr || !context.identity->MaySee(lease->tenant())) return false;
  lock->keyed.Release(id);
  lock->changed.NotifyAll();
  return true;
}

// Loads.
absl::StatusOr<KeyedLease*> KeyedStore::FindLease(CacheLock& lock, LeaseId id, const CallContext& context) {
  lock->keyed.ExpireLeases(core_.options().clock());
  KeyedLease* const lease = lock->keyed.FindLease(id);
  if (lease == nullptr || !context.identity->MaySee(lease->tenant())) {
    const absl::Status unknown = absl::NotFoundError(
        absl::StrCat("lease ", id, " is unknown or over; look the keys up again (LookupBlocks)"));
    return lease == nullptr ? unknown : Refused(Refusal::kOtherTenant, unknown);
  }
  if (lease->space == nullptr)
    return absl::FailedPreconditionError(
        absl::StrCat("lease ", id, " is of a prefix: a sequence begins with it (CreateSequence)"));
  return lease;
}

absl::StatusOr<LeaseInfo> KeyedStore::DescribeLease(LeaseId id, const CallContext& context) {
  CacheLock lock(core_);
  KVTIDE_ASSIGN_OR_RETURN(const KeyedLease* lease, FindLease(lock, id, context));
  return LeaseInfo{lease->space->spec, lease->space->form.bytes, lease->blocks.size()};
}

struct KeyedStore::Read {
  size_t index = 0;  // in the call
  PinnedPlace place;
  // What the bytes there are: the block may have others by the time that they are read.
  BlockForm form = BlockForm::Opaque(0);
  bool verify = false;
  uint64_t checksum = 0;
  absl::Status status;
};

absl::StatusOr<LoadReport> KeyedStore::Load(const LoadCall& call) {
  const CallContext& context = ContextOf(call.context);
  const CacheOptions& options = core_.options();
  LoadReport report;
  CacheLock lock(core_);
  BlockStore& store = lock->store;
  KVTIDE_ASSIGN_OR_RETURN(const KeyedLease* lease, FindLease(lock, call.lease, context));
  if (call.blocks > lease->blocks.size() || call.first > lease->blocks.size() - call.blocks)
    return absl::OutOfRangeError(absl::StrCat("blocks ", call.first, " to ",
                                              SaturatingAdd(call.first, call.blocks), " of a lease of ",
                                              lease->blocks.size()));
  const NamespacePtr space = lease->space;
  const bool in_place = call.in_place >= 0;
  std::optional<KeyedPayload> payload;
  if (!in_place) {
    KVTIDE_ASSIGN_OR_RETURN(payload, KeyedPayload::Outgoing(*space, call.form, call.layout,
                                                            static_cast<size_t>(call.blocks), call.payload));
  } else if (call.form != BlockPayload::kBytes) {
    return absl::InvalidArgumentError("blocks are read in place as they rest (BLOCK_FORM_BYTES)");
  } else if (held_.size() >= options.max_leases) {
    return Refused(Refusal::kLimit,
                   absl::ResourceExhaustedError(absl::StrCat(
                       held_.size(), " loads in place are not given back, which is the limit (max_leases)")));
  }
  // The lease may end while this runs; what it reads stays.
  std::vector<HeldBlock> blocks;
  blocks.reserve(static_cast<size_t>(call.blocks));
  for (uint64_t i = 0; i < call.blocks; i++)
    blocks.emplace_back(store, lease->blocks[static_cast<size_t>(call.first + i)].get());
  if (options.trace != nullptr) {
    std::vector<BlockKey> keys;
    for (const HeldBlock& held : blocks) keys.push_back(held->key);
    Trace(options, TraceVerb::kLoad, *space, keys);
  }
  Held held;
  uint64_t elsewhere = 0;  // in place: blocks that another load has to bring
  uint64_t loaded_bytes = 0;
  if (in_place) report.offsets.assign(blocks.size(), -1);
  std::deque<size_t> left(blocks.size());
  std::iota(left.begin(), left.end(), size_t{0});
  while (!left.empty()) {
    std::vector<size_t> indices;
    std::vector<HeldBlock> batch;
    for (; !left.empty() && batch.size() < options.max_moves_in_flight; left.pop_front()) {
      indices.push_back(left.front());
      batch.emplace_back(store, blocks[left.front()].get());
    }
    KVTIDE_RETURN_IF_ERROR(context.Check(options.clock(), "the load"));
    // They go by a record of their own: the rest of the lease may make way for them.
    PriorityRecords records(store, options.clock());
    for (const HeldBlock& one : batch)
      if (one->keyed && mover_.IsFar(*one.get()))
        store.Rejoin(one.get(), records.Of(*one.get()), BlockStore::End::kColdest);
    KVTIDE_RETURN_IF_ERROR(mover_.BringIn(lock, batch, store.serial() + 1, context));
    if (space->deleted) return DeletedError(*space);
    std::vector<Read> reads;
    bool some_degraded = false;
    for (const size_t index : indices) {
      Block* const block = blocks[index].get();
      if (block->place == nullptr) {
        report.lost.push_back(call.first + index);
        continue;
      }
      const bool degraded = block->kind->IsDegraded();
      // Who reads in place knows one form.
      if (in_place && (block->place->tier != call.in_place || degraded)) {
        if (degraded) report.degraded.push_back(call.first + index);
        elsewhere++;
        continue;
      }
      some_degraded = some_degraded || degraded;
      Read read;
      read.index = index;
      read.form = block->form();
      read.place = PinnedPlace(store, block->place);
      // In place once for as long as the block lies there: a processor looks at every byte for it.
      read.verify = block->has_checksum && store.tier(block->place->tier).checksum &&
                    !(in_place && block->place->compared);
      read.checksum = block->checksum;
      reads.push_back(std::move(read));
    }
    const bool touches =
        !in_place || std::any_of(reads.begin(), reads.end(), [](const Read& read) { return read.verify; });
    if (touches) {
      const Unlocked unlocked(lock);
      const bool side_by_side = in_place || (payload->side_by_side() && !some_degraded);
      Copies(reads.size(), space->form.bytes, side_by_side, [&](size_t i) {
        Read& read = reads[i];
        std::byte* const data = core_.Data(*read.place.get());
        if (!in_place) {
          read.status =
              payload->Read(core_.backend(read.place->tier), read.place->tier, read.index, data, read.form,
                            read.verify ? &read.checksum : nullptr, context.cancellation);
        } else if (read.verify) {
          read.status = CheckBlock({data, space->form.bytes}, read.checksum);
        }
        return read.status.ok() || absl::IsDataLoss(read.status);
      });
    }
    absl::Status status;
    for (Read& read : reads) {
      if (!read.status.ok() && !absl::IsDataLoss(read.status) && status.ok()) status = read.status;
      if (!absl::IsDataLoss(read.status)) {
        loaded_bytes += read.form.bytes;
        if (read.form.layout != space->form.layout) report.degraded.push_back(call.first + read.index);
        if (!in_place) continue;
        read.place->compared = read.place->compared || (read.verify && read.status.ok());
        report.offsets[read.index] = static_cast<int64_t>(read.place->offset);
        held.places.push_back(std::move(read.place));
        continue;
      }
      lock->counters.checksum_failures++;
      Block* const block = blocks[read.index].get();
      const bool there = block->place == read.place.get() && !block->moving && !block->writing;
      if (there && block->has_backup) store.MoveToBackup(block);          // the same bytes, on the disk
      if (block->place != nullptr && block->place != read.place.get()) {  // maybe by another call
        left.push_back(read.index);
        continue;
      }
      report.lost.push_back(call.first + read.index);
      lock->counters.lost_blocks++;
      if (there) {
        store.tier(block->place->tier).lost++;
        store.Drop(block);
      }
    }
    KVTIDE_RETURN_IF_ERROR(status);
  }
  std::sort(report.lost.begin(), report.lost.end());
  std::sort(report.degraded.begin(), report.degraded.end());
  const uint64_t loaded = call.blocks - report.lost.size() - elsewhere;
  Counters& counters = lock->counters;
  space->loaded += loaded;
  counters.keyed_loaded += loaded;
  counters.keyed_loaded_bytes += loaded_bytes;
  report.blocks = call.blocks;
  if (!report.lost.empty() && !call.allow_lost) return LostError(report.lost);
  if (held.places.empty()) return report;
  held.bytes = loaded_bytes;
  counters.keyed_in_place += loaded;
  counters.keyed_in_place_bytes += held.bytes;
  counters.keyed_held += loaded;
  counters.keyed_held_bytes += held.bytes;
  while (report.places == 0 || held_.contains(report.places)) report.places = lock->sequences.RandomId();
  held_.emplace(report.places, std::move(held));
  return report;
}

bool KeyedStore::ReleasePlaces(PlacesId places) {
  CacheLock lock(core_);
  const auto found = held_.find(places);
  if (found == held_.end()) return false;
  lock->counters.keyed_held -= found->second.places.size();
  lock->counters.keyed_held_bytes -= found->second.bytes;
  held_.erase(found);
  lock->changed.NotifyAll();
  return true;
}

}  // namespace kvtide
