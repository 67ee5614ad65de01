#include "daemon/cache/persist/persister.h"

#include <algorithm>
#include <map>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "daemon/cache/block/block_label.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/call/spec_hash.h"
#include "daemon/cache/move/move_batch.h"
#include "daemon/cache/move/room_maker.h"
#include "daemon/cache/move/room_text.h"
#include "daemon/cache/persist/keyed_manifest.h"
#include "daemon/cache/sequence/persist_turn.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint64_t kAnySerial = ~uint64_t{0};

// What a block of a manifest is stored as; CheckCoding has compared the ladders.
const BlockLayout* LayoutOf(const ManifestBlock& block, const GroupTable& table) {
  if (block.form == ManifestBlock::kCoded) return table.coded;
  if (block.form == ManifestBlock::kExact) return table.exact;
  return RungsBelow(table)[block.form - ManifestBlock::kRungs];
}

std::vector<ManifestRung> Rungs(const GroupTable& table) {
  std::vector<ManifestRung> rungs;
  for (const BlockLayout* const layout : RungsBelow(table)) {
    const CachePair pair = layout->pair();
    rungs.push_back({PairName(pair), Info(pair.k).version, Info(pair.v).version, HashLayout(*layout)});
  }
  return rungs;
}

// Of a block that RestoreBlock gave nothing for.
std::string WhyNotRestored(const Tier& tier, const ManifestBlock& from, const GroupTable& table) {
  const size_t bytes = tier.ExtentBytes(LayoutOf(from, table)->block_bytes());
  const size_t capacity = tier.allocator.capacity_bytes();
  if (from.offset > capacity || bytes > capacity - from.offset)
    return absl::StrCat("lies at ", from.offset, ", behind the end of tier '", tier.name, "' of ", capacity,
                        " bytes");
  const auto next = tier.places.lower_bound(from.offset);
  if (next != tier.places.end() && next->first < from.offset + bytes)
    return "lies where another one was restored";
  if (next != tier.places.begin() && std::prev(next)->first + std::prev(next)->second->extent() > from.offset)
    return "lies where another one was restored";
  return "has lost the profile of its keys";
}

}  // namespace

Persister::Persister(CacheCore& core) : core_(core), room_(core) {
  const std::vector<TierOptions>& tiers = core.options().tiers;
  for (size_t t = 0; t < tiers.size(); t++) {
    if (tiers[t].index == nullptr) continue;
    tier_ = static_cast<int>(t);
    index_ = tiers[t].index;
  }
}

Place* Persister::DurablePlace(const BlockStore& store, const Block& block) const {
  if (block.place != nullptr && block.place->tier == tier_) return block.place;
  Place* const backup = store.Backup(block);
  return backup != nullptr && backup->tier == tier_ ? backup : nullptr;
}

void Persister::Start() {
  if (index_ != nullptr) thread_ = std::thread([this] { Run(); });
}

void Persister::Stop() {
  {
    CacheLock lock(core_);
    stopping_ = true;
    wake_.NotifyAll();
  }
  if (thread_.joinable()) thread_.join();
}

void Persister::Run() {
  while (true) {
    {
      CacheLock lock(core_);
      if (!stopping_) lock.Wait(wake_, core_.options().persist_interval);
      if (stopping_) return;
    }
    PersistChanged();
  }
}

absl::StatusOr<PersistReport> Persister::Persist(std::span<const SequenceId> ids,
                                                 const CallContext& context) {
  if (index_ == nullptr)
    return absl::FailedPreconditionError(
        "no tier survives a restart; give the cache one (kvtided --disk PATH:SIZE)");
  CacheLock lock(core_);
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<SequencePtr> sequences, lock->sequences.FindAll(ids, context));
  lock->counters.persist_calls++;
  PersistReport report;
  for (const SequencePtr& sequence : sequences)
    KVTIDE_RETURN_IF_ERROR(AnnotateRefused(PersistOne(lock, sequence, context, &report),
                                           absl::StrCat("sequence ", sequence->id)));
  return report;
}

absl::Status Persister::PersistParked(std::span<const SequenceId> ids, const CallContext& context) {
  if (index_ == nullptr) return absl::OkStatus();
  CacheLock lock(core_);
  PersistReport report;
  for (const SequenceId id : ids) {
    const absl::StatusOr<SequencePtr> sequence = lock->sequences.Find(id, context);
    if (!sequence.ok() || (*sequence)->options.persistence == Persistence::kNone) continue;
    KVTIDE_RETURN_IF_ERROR(Annotate(PersistOne(lock, *sequence, context, &report),
                                    absl::StrCat("sequence ", id, " is parked, but not durable")));
  }
  return absl::OkStatus();
}

void Persister::PersistChanged() {
  if (index_ == nullptr) return;
  CacheLock lock(core_);
  std::vector<SequencePtr> changed;
  for (const auto& [id, sequence] : lock->sequences.all())
    if (sequence->options.persistence == Persistence::kAll && !sequence->persisting &&
        !sequence->options.seal_at_once &&
        (!sequence->durable.exists || sequence->durable.changes != sequence->changes))
      changed.push_back(sequence);
  PersistReport report;
  // What fails is counted with its words where it does, and tried again the next time.
  for (const SequencePtr& sequence : changed) PersistOne(lock, sequence, {}, &report).IgnoreError();
  PersistNamespaces(lock);
  EraseDeadRuns(lock).IgnoreError();
}

absl::Status Persister::PersistOne(CacheLock& lock, const SequencePtr& sequence, const CallContext& context,
                                   PersistReport* report) {
  const CacheOptions& options = core_.options();
  if (sequence->options.seal_at_once)
    return absl::FailedPreconditionError("it codes at once (evaluation mode) and is not for keeping");
  const absl::Time last = options.clock() + options.io_wait;
  while (sequence->persisting) {
    KVTIDE_RETURN_IF_ERROR(context.Check(options.clock(), "the call, before it was its turn"));
    if (options.clock() >= last || options.room_wait <= absl::ZeroDuration())
      return absl::AbortedError("another call makes it durable; try again");
    lock.WaitForChange(options.room_wait);
  }
  struct Mark {
    CacheLock& lock;
    Sequence& sequence;
    explicit Mark(CacheLock& l, Sequence& s) : lock(l), sequence(s) { sequence.persisting = true; }
    ~Mark() {
      sequence.persisting = false;
      lock->changed.NotifyAll();
    }
  } const mark(lock, *sequence);
  std::vector<PinnedPlace> pins;  // what was written for this
  const auto fail = [&](absl::Status status) {
    lock->counters.FailPersist(absl::StrCat("sequence ", sequence->id), status);
    return status;
  };
  if (absl::Status status = WriteBackups(lock, *sequence, false, context, &pins, report); !status.ok())
    return fail(std::move(status));
  // What may still change: with nobody writing.
  std::string bytes;
  Durable next;
  {
    const absl::StatusOr<WriterGuard> guard = BecomeWriter(lock, sequence, context);
    if (!guard.ok()) return sequence->closed ? guard.status() : fail(guard.status());
    if (absl::Status status = WriteBackups(lock, *sequence, true, context, &pins, report); !status.ok())
      return fail(std::move(status));
    if (sequence->closed) return absl::AbortedError("it was closed");  // nobody misses it
    next.tokens = sequence->MinTokens();
    next.changes = sequence->changes;
    next.exists = true;
    bytes = EncodeManifest(Describe(*lock, *sequence, &next.places));
    for (const Block* block : Fallen(*lock, *sequence))
      if (Place* const place = DurablePlace(lock->store, *block); place != nullptr && !block->moving)
        next.places.push_back(place);
    for (Place* place : next.places) lock->store.Keep(place);
  }
  lock->changed.NotifyAll();
  lock->prefixes.LeaveRun(sequence->id);  // whose value this one replaces
  absl::Status status = Write(lock, sequence->id, bytes);
  if (!status.ok()) {
    if (absl::IsResourceExhausted(status)) {
      Release(*lock, &next);
    } else {
      in_doubt_.emplace_back(sequence->id, std::move(next.places));  // either manifest may be there
    }
    return fail(std::move(status));
  }
  if (!sequence->durable.exists) lock->durable_sequences++;
  std::swap(sequence->durable, next);
  Release(*lock, &next);
  Settle(*lock, sequence->id);
  lock->counters.persisted++;
  report->sequences++;
  report->tokens += sequence->durable.tokens;
  // Closed meanwhile, it must not come back.
  if (sequence->closed) return Forget(lock, *sequence);
  return absl::OkStatus();
}

absl::StatusOr<WriterGuard> Persister::BecomeWriter(CacheLock& lock, const SequencePtr& sequence,
                                                    const CallContext& context) {
  const CacheOptions& options = core_.options();
  const absl::Time last = options.clock() + options.io_wait;
  while (true) {
    absl::StatusOr<WriterGuard> guard =
        WriterGuard::Begin(lock->sequences, sequence, PersistingWriter(*sequence));
    if (guard.ok() || sequence->closed) return guard;
    KVTIDE_RETURN_IF_ERROR(context.Check(options.clock(), "the call, while others wrote"));
    if (options.clock() >= last || options.room_wait <= absl::ZeroDuration()) return guard;
    lock.WaitForChange(options.room_wait);
  }
}

// Blocks of a prefix that have left the sequence's sliding windows, but would be seen after its last sealed
// block: what stays of it when it is closed begins with them.
std::vector<Block*> Persister::Fallen(const CacheState& state, const Sequence& sequence) {
  std::vector<Block*> fallen;
  for (size_t g = 0; sequence.found_blocks > 0 && g < sequence.groups.size(); g++) {
    const int64_t first =
        PrefixIndex::FirstBlock(*sequence.prefixes, static_cast<int>(g), sequence.found_blocks);
    for (int64_t i = first; i < std::min(sequence.groups[g].first_block(), sequence.found_blocks); i++)
      if (Block* const block =
              state.prefixes.Get(*sequence.prefixes, PrefixIndex::KeyOf(sequence, i), static_cast<int>(g));
          block != nullptr)
        fallen.push_back(block);
  }
  return fallen;
}

// `all`: the caller is the writer; else what may still change is left out.
absl::Status Persister::WriteBackups(CacheLock& lock, const Sequence& sequence, bool all,
                                     const CallContext& context, std::vector<PinnedPlace>* pins,
                                     PersistReport* report) {
  const CacheOptions& options = core_.options();
  const absl::Time last = options.clock() + options.io_wait;
  while (true) {
    KVTIDE_RETURN_IF_ERROR(context.Check(options.clock(), "the call, while blocks were written"));
    std::vector<HeldBlock> batch;
    bool moving = false;
    for (const GroupTable& table : sequence.groups) {
      const int64_t full = table.MinTokens() / kBlockTokens;
      const int64_t end = all ? table.end_block() : std::min(full, table.end_block());
      for (int64_t index = table.first_block(); index < end && batch.size() < options.max_moves_in_flight;
           index++) {
        Block* const block = table.at(index);
        if (block->place == nullptr)
          return absl::DataLossError(
              absl::StrCat("tokens ", index * kBlockTokens, " to ", (index + 1) * kBlockTokens - 1,
                           " were dropped or lost; truncate to ", index * kBlockTokens));
        if (block->writing) continue;
        // What lies there is pinned too, so that it stays until the manifest keeps it.
        if (Place* place = DurablePlace(lock->store, *block); place != nullptr && !block->moving) continue;
        if (block->moving) {
          moving = true;
        } else {
          batch.emplace_back(lock->store, block);
        }
      }
    }
    for (Block* const block : Fallen(*lock, sequence))
      if (batch.size() < options.max_moves_in_flight && !block->writing && !block->moving &&
          DurablePlace(lock->store, *block) == nullptr)
        batch.emplace_back(lock->store, block);
    if (batch.empty()) {
      if (!moving || !all) return absl::OkStatus();
      if (options.clock() >= last || options.room_wait <= absl::ZeroDuration())
        return absl::AbortedError("a block is being moved for too long; try again");
      lock.WaitForChange(options.room_wait);
      continue;
    }
    MakeDiskRoom(lock, sequence, batch);
    // The mutex was free.
    std::erase_if(batch, [&](const HeldBlock& block) {
      return block->moving || block->writing || block->place == nullptr ||
             DurablePlace(lock->store, *block.get()) != nullptr;
    });
    if (!batch.empty()) KVTIDE_RETURN_IF_ERROR(WriteBatch(lock, batch, context, pins, report));
  }
}

// What is only cached makes way: blocks that nobody has are dropped, then the oldest runs are forgotten.
void Persister::MakeDiskRoom(CacheLock& lock, const Sequence& sequence, std::span<const HeldBlock> blocks) {
  const Tier& tier = lock->store.tier(tier_);
  size_t bytes = 0, largest = 0;
  for (const HeldBlock& block : blocks) {
    bytes += tier.ExtentBytes(block->bytes());
    largest = std::max(largest, block->bytes());
  }
  // None of its own blocks for another one.
  const uint64_t before =
      sequence.options.allow_drop ? lock->store.TouchSerial(*blocks.front().get()) : kAnySerial;
  constexpr int kRounds = 64;
  for (int round = 0; round < kRounds && tier.allocator.free_bytes() < bytes; round++)
    if (!room_.MakeFree(lock, tier_, tier.allocator.free_bytes() + largest, bytes, before) &&
        !LetOldestRunGo(lock, 0, absl::ResourceExhaustedError("")).ok())
      break;
}

absl::Status Persister::WriteBatch(CacheLock& lock, std::span<const HeldBlock> blocks,
                                   const CallContext& context, std::vector<PinnedPlace>* pins,
                                   PersistReport* report) {
  BlockStore& store = lock->store;
  std::vector<CopyJob> jobs;
  std::vector<Place*> targets;
  std::vector<Block*> copied;
  std::vector<PinnedPlace> sources;
  absl::Status status;
  for (const HeldBlock& held : blocks) {
    Block* const block = held.get();
    Place* const target = store.Reserve(tier_, *block);
    if (target == nullptr) {
      const size_t bytes = block->bytes();
      const absl::Time now = core_.options().clock();
      status = absl::ResourceExhaustedError(store.MayLie(*block, tier_)
                                                ? NoRoomText(*lock, bytes, block->account(), now)
                                                : OverQuotaText(*lock, bytes, *block->account(), now));
      break;
    }
    NameWrite(core_, *block, target);
    block->moving = true;
    sources.emplace_back(store, block->place);
    jobs.emplace_back(store, *block, *block->place, *target);
    targets.push_back(target);
    copied.push_back(block);
  }
  lock->moves_running++;
  if (!jobs.empty()) {
    const Unlocked unlocked(lock);
    CopyAll(core_, jobs, context.cancellation);
  }
  lock->moves_running--;
  for (size_t i = 0; i < jobs.size(); i++) {
    Block* const block = copied[i];
    block->moving = false;
    absl::Status of_job = jobs[i].status;
    const uint64_t checksum = jobs[i].target_label.checksum;
    if (of_job.ok() && block->has_checksum && block->checksum != checksum)
      of_job = absl::DataLossError("a block's bytes are not those that were stored");
    if (of_job.ok()) {
      targets[i]->Written().checksum = checksum;
      pins->emplace_back(store, targets[i]);
      store.Retire(targets[i]);
      store.SetBackup(block, targets[i]);
      report->blocks++;
      report->bytes += jobs[i].bytes;
      lock->counters.persisted_bytes += jobs[i].bytes;
    } else {
      store.Retire(targets[i]);
      if (status.ok()) status = std::move(of_job);
    }
  }
  lock->changed.NotifyAll();
  return status;
}

Manifest Persister::DescribeEmpty(const CacheState& state, const Sequence& sequence) {
  Manifest manifest;
  manifest.id = sequence.id;
  manifest.forked_from = sequence.forked_from;
  manifest.created_unix_nanos = absl::ToUnixNanos(sequence.created);
  manifest.device = state.store.tier(sequence.home).device;
  manifest.model = sequence.model->spec;
  manifest.model_tenant = sequence.model->tenant;
  manifest.model_revision = sequence.model->revision;
  manifest.options = sequence.options;
  for (const GroupTable& table : sequence.groups) {
    ManifestGroup& group = manifest.groups.emplace_back();
    const CachePair pair = table.coded->pair();
    group.pair = PairName(pair);
    group.codec_version_k = Info(pair.k).version;
    group.codec_version_v = Info(pair.v).version;
    group.exact_layout = HashLayout(*table.exact);
    group.coded_layout = HashLayout(*table.coded);
    group.rungs = Rungs(table);
  }
  if (sequence.chain.has_value()) {
    manifest.chain_seed = sequence.prefixes->seed;
    manifest.chain_keys = PrefixIndex::KeysOf(sequence);
  }
  return manifest;
}

int32_t Persister::AddProfile(const std::shared_ptr<const Profile>& profile, ManifestGroup* group) {
  if (profile == nullptr) return -1;
  const auto found = std::find(group->profiles.begin(), group->profiles.end(), profile);
  const auto index = static_cast<int32_t>(found - group->profiles.begin());
  if (found == group->profiles.end()) group->profiles.push_back(profile);
  return index;
}

void Persister::AddBlock(const GroupTable& table, const Block& block, const Place* place,
                         ManifestGroup* group) const {
  KVTIDE_CHECK(place != nullptr, "block ", block.id, " is not durable");
  ManifestBlock& out = group->blocks.emplace_back();
  out.offset = place->offset;
  out.write_id = place->Written().write_id;
  out.checksum = place->Written().checksum;
  out.writer = block.sequence;
  out.profile = AddProfile(block.profile(), group);
  if (block.layout() == table.exact) {
    out.form = ManifestBlock::kExact;
  } else if (block.layout() != table.coded) {
    const auto rungs = RungsBelow(table);
    const auto rung = std::find(rungs.begin(), rungs.end(), block.layout());
    KVTIDE_CHECK(rung != rungs.end());
    out.form = ManifestBlock::kRungs + static_cast<uint32_t>(rung - rungs.begin());
  }
}

Manifest Persister::Describe(const CacheState& state, const Sequence& sequence,
                             std::vector<Place*>* places) const {
  Manifest manifest = DescribeEmpty(state, sequence);
  for (size_t g = 0; g < sequence.groups.size(); g++) {
    const GroupTable& table = sequence.groups[g];
    ManifestGroup& group = manifest.groups[g];
    group.first_block = table.first_block();
    group.sealed = table.sealed;
    for (size_t l = 0; l < table.layers(); l++) group.layers.push_back(table.layer(static_cast<int>(l)));
    group.profile = AddProfile(table.profile, &group);
    table.blocks->ForEach([&](const Block* block) {
      places->push_back(DurablePlace(state.store, *block));
      AddBlock(table, *block, places->back(), &group);
    });
  }
  if (sequence.chain.has_value()) {
    const std::span<const TokenId> rest = sequence.chain->rest();
    manifest.chain_rest.assign(rest.begin(), rest.end());
  }
  return manifest;
}

std::unique_ptr<KeptPrefix> Persister::KeepPrefix(CacheState& state, const Sequence& sequence) {
  if (index_ == nullptr || !sequence.durable.exists || sequence.found_blocks == 0) return nullptr;
  const PrefixSpace& space = *sequence.prefixes;
  const std::vector<BlockKey> keys = PrefixIndex::KeysOf(sequence);
  const int groups = static_cast<int>(sequence.groups.size());
  // The longest prefix that is durable with everything that the next token would see.
  constexpr int64_t kTries = 64;
  // Blocks of its own, beside those that were found in their place, are what is durable of it.
  state.prefixes.Prefer(sequence, [&](const Block& block) {
    return !block.moving && DurablePlace(state.store, block) != nullptr;
  });
  const auto durable = [&](int g, int64_t index) {
    const Block* const block = state.prefixes.Get(space, keys[static_cast<size_t>(index)], g);
    return block != nullptr && !block->moving && DurablePlace(state.store, *block) != nullptr;
  };
  int64_t blocks = 0;
  while (blocks < sequence.found_blocks) {
    bool whole = true;
    for (int g = 0; g < groups; g++)
      whole = whole && (space.windows[static_cast<size_t>(g)] > 0 || durable(g, blocks));
    if (!whole) break;
    blocks++;
  }
  const auto holds_windows = [&](int64_t end) {
    for (int g = 0; g < groups; g++)
      for (int64_t i = PrefixIndex::FirstBlock(space, g, end); i < end; i++)
        if (space.windows[static_cast<size_t>(g)] > 0 && !durable(g, i)) return false;
    return true;
  };
  for (const int64_t least = std::max<int64_t>(0, blocks - kTries); blocks > least && !holds_windows(blocks);)
    blocks--;
  if (blocks == 0 || !holds_windows(blocks)) return nullptr;

  Manifest manifest = DescribeEmpty(state, sequence);
  manifest.closed = true;
  last_written_ = std::max(last_written_ + 1, absl::ToUnixNanos(core_.options().clock()));
  manifest.written_unix_nanos = last_written_;
  manifest.chain_keys.resize(static_cast<size_t>(blocks));
  auto run = std::make_unique<PrefixRun>();
  run->id = sequence.id;
  run->written = manifest.written_unix_nanos;
  bool is_new = false;
  for (int g = 0; g < groups; g++) {
    const GroupTable& table = sequence.groups[static_cast<size_t>(g)];
    ManifestGroup& group = manifest.groups[static_cast<size_t>(g)];
    group.first_block = PrefixIndex::FirstBlock(space, g, blocks);
    group.sealed = blocks;
    group.layers.assign(table.layers(), {blocks * kBlockTokens, -1, 0});
    group.profile = AddProfile(table.profile, &group);
    for (int64_t i = group.first_block; i < blocks; i++) {
      const Block* const block = state.prefixes.Get(space, keys[static_cast<size_t>(i)], g);
      run->blocks.emplace_back(block->id, DurablePlace(state.store, *block));
      AddBlock(table, *block, run->blocks.back().second, &group);
      is_new = is_new || !state.prefixes.IsDurable(*block);
    }
  }
  if (!is_new) return nullptr;  // other runs have all of it
  for (const auto& [id, place] : run->blocks) state.store.Keep(place);
  auto kept = std::make_unique<KeptPrefix>();
  kept->bytes = EncodeManifest(manifest);
  kept->run = std::move(run);
  return kept;
}

void Persister::Release(CacheState& state, Durable* durable) {
  for (Place* place : std::exchange(durable->places, {})) state.store.Unkeep(place);
}

absl::Status Persister::Write(CacheLock& lock, uint64_t id, const std::string& bytes) {
  while (true) {
    absl::Status status;
    {
      const Unlocked unlocked(lock);
      status = index_->Put(id, bytes);
    }
    if (!absl::IsResourceExhausted(status)) return status;
    KVTIDE_RETURN_IF_ERROR(LetOldestRunGo(lock, id, status));
  }
}

absl::Status Persister::LetOldestRunGo(CacheLock& lock, uint64_t besides, const absl::Status& why) {
  const uint64_t oldest = lock->prefixes.OldestRun(besides);
  if (oldest == 0) return why;
  // It is forgotten on the disk first: its places are kept until then.
  absl::Status status;
  {
    const Unlocked unlocked(lock);
    status = index_->Erase({{oldest}});
  }
  if (!status.ok()) return why;
  lock->prefixes.LeaveRun(oldest);
  lock->changed.NotifyAll();
  return absl::OkStatus();
}

void Persister::Settle(CacheState& state, SequenceId id) {
  for (auto& [doubted, places] : in_doubt_)
    if (doubted == id)
      for (Place* place : std::exchange(places, {})) state.store.Unkeep(place);
  std::erase_if(in_doubt_, [&](const auto& doubt) { return doubt.first == id; });
}

absl::Status Persister::EraseDeadRuns(CacheLock& lock) {
  const std::vector<uint64_t> dead = lock->prefixes.TakeDeadRuns();
  if (dead.empty() || index_ == nullptr) return absl::OkStatus();
  absl::Status status;
  {
    const Unlocked unlocked(lock);
    status = index_->Erase(dead);
  }
  if (!status.ok()) {
    lock->prefixes.GiveDeadRuns(dead);
    lock->counters.FailPersist("prefixes that were forgotten", status);
  }
  return Annotate(status, "prefixes are forgotten, but may be there again after a restart");
}

absl::Status Persister::Forget(CacheLock& lock, Sequence& sequence, std::unique_ptr<KeptPrefix> kept) {
  if (sequence.persisting && !sequence.durable.exists) return absl::OkStatus();  // that call forgets it
  if (kept != nullptr) {
    lock->prefixes.EnterRun(std::move(kept->run));
    const absl::Status status = Write(lock, sequence.id, kept->bytes);
    // What was forgotten meanwhile, all of it, must not come back.
    if (status.ok() && lock->prefixes.HasRun(sequence.id)) {
      lock->counters.persisted++;
      lock->durable_sequences--;
      Release(*lock, &sequence.durable);
      sequence.durable = {};
      Settle(*lock, sequence.id);
      lock->changed.NotifyAll();
      return absl::OkStatus();
    }
    if (!status.ok())
      lock->counters.FailPersist(absl::StrCat("the prefix of sequence ", sequence.id, ", which was closed"),
                                 status);
  }
  // A Persist that ran while it was closed may have written over what was kept.
  lock->prefixes.LeaveRun(sequence.id);
  std::vector<SequenceId> keys;
  for (const auto& [id, places] : in_doubt_) keys.push_back(id);
  if (sequence.durable.exists) {
    lock->durable_sequences--;
    keys.push_back(sequence.id);
    in_doubt_.emplace_back(sequence.id, std::move(sequence.durable.places));
    sequence.durable = {};
  }
  // Those of open sequences are settled by their next Persist.
  std::erase_if(keys, [&](SequenceId id) { return id != sequence.id && lock->sequences.IsOpen(id); });
  if (keys.empty()) return absl::OkStatus();
  absl::Status status;
  {
    const Unlocked unlocked(lock);
    status = index_->Erase(keys);
  }
  if (!status.ok()) {
    lock->counters.FailPersist(absl::StrCat("sequence ", sequence.id, ", which was closed"), status);
    return Annotate(
        status, absl::StrCat("sequence ", sequence.id, " is closed, but may be there again after a restart"));
  }
  for (const SequenceId id : keys) Settle(*lock, id);
  lock->changed.NotifyAll();
  return absl::OkStatus();
}

RestoreReport Persister::Restore() {
  RestoreReport report;
  if (index_ == nullptr) return report;
  const std::map<uint64_t, std::string> manifests = index_->Load(&report.lost);
  std::vector<uint64_t> refused;
  CacheLock lock(core_);
  // Where two of them name the same bytes, the newer one has them: shards may name blocks that were dropped
  // later.
  std::vector<std::pair<int64_t, uint64_t>> shards;
  for (const auto& [key, bytes] : manifests) {
    lock->sequences.Reserve(key);
    if (IsKeyedManifest(bytes)) {
      shards.emplace_back(-WrittenAt(bytes), key);
      continue;
    }
    if (int64_t written = 0; IsClosedManifest(bytes, &written)) {
      shards.emplace_back(-written, key);
      continue;
    }
    const absl::Status status = RestoreOne(lock, bytes, &report);
    if (status.ok()) continue;
    report.lost.push_back(absl::StrCat("sequence ", key, ": ", status.message()));
    refused.push_back(key);
  }
  std::sort(shards.begin(), shards.end());
  std::vector<Returned> cached;
  for (const auto& [written, key] : shards) {
    const std::string& bytes = manifests.at(key);
    const bool keyed = IsKeyedManifest(bytes);
    const absl::Status status = keyed ? RestoreShard(lock, key, bytes, &report, &cached.emplace_back())
                                      : RestoreRun(lock, bytes, &report, &cached.emplace_back());
    if (status.ok()) continue;
    if (keyed || !absl::IsNotFound(status))  // a prefix of which nothing is left was dropped in order
      report.lost.push_back(absl::StrCat(keyed ? "blocks of a namespace (" : "a cached prefix (", key,
                                         "): ", status.message()));
    refused.push_back(key);
  }
  // What was written last was used last.
  for (auto returned = cached.rbegin(); returned != cached.rend(); ++returned) {
    const RecencyPtr record =
        lock->store.NewRecency(core_.options().clock(), Standing::kUsed, returned->priority);
    for (Block* const block : returned->blocks) lock->store.Join(block, record, returned->end);
  }
  profiles_.clear();
  // Its blocks' room is given to others from now on.
  if (!refused.empty()) {
    const Unlocked unlocked(lock);
    if (const absl::Status status = index_->Erase(refused); !status.ok())
      report.lost.push_back(absl::StrCat("they could not be removed: ", status.message()));
  }
  return report;
}

absl::StatusOr<SequencePtr> Persister::Rebuild(CacheLock& lock, const Manifest& manifest) {
  KVTIDE_RETURN_IF_ERROR(CheckModelSpec(manifest.model));
  KVTIDE_ASSIGN_OR_RETURN(
      const ModelId model,
      manifest.model_revision == 0
          ? lock->sequences.RegisterModel(manifest.model, manifest.model_tenant, true)
          : lock->sequences.RestoreRevision(manifest.model, manifest.model_tenant, manifest.model_revision));
  SequenceOptions options = manifest.options;
  // Where it lived; anywhere if that device is no more.
  options.device = manifest.device;
  absl::StatusOr<SequencePtr> built = lock->sequences.Build(model, options, true);
  if (!built.ok()) {
    options.device.clear();
    built = lock->sequences.Build(model, options, true);
  }
  KVTIDE_RETURN_IF_ERROR(built.status());
  const SequencePtr sequence = *built;
  sequence->id = manifest.id;
  sequence->forked_from = manifest.forked_from;
  sequence->options = manifest.options;
  sequence->created = absl::FromUnixNanos(manifest.created_unix_nanos);
  if (!manifest.chain_keys.empty() || !manifest.chain_rest.empty()) {
    const PrefixSpacePtr space = lock->prefixes.Open(*sequence);
    // Another build may tell tokens apart in another way; then they are not known any more.
    if (space->seed == manifest.chain_seed) {
      sequence->prefixes = space;
      sequence->chain.emplace(space->seed, manifest.chain_keys, manifest.chain_rest);
    }
  }
  return sequence;
}

absl::StatusOr<Manifest> Persister::Decode(const std::string& bytes) {
  KVTIDE_ASSIGN_OR_RETURN(Manifest manifest, DecodeManifest(bytes));
  // Forks had one profile in common, and so do they again.
  for (ManifestGroup& group : manifest.groups)
    for (std::shared_ptr<const Profile>& profile : group.profiles)
      profile = profiles_.try_emplace(profile->hash, profile).first->second;
  return manifest;
}

absl::Status Persister::RestoreOne(CacheLock& lock, const std::string& bytes, RestoreReport* report) {
  KVTIDE_ASSIGN_OR_RETURN(const Manifest manifest, Decode(bytes));
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, Rebuild(lock, manifest));
  absl::Status status;
  for (size_t g = 0; g < manifest.groups.size() && status.ok(); g++)
    status = Annotate(RestoreGroup(lock, manifest, g, *sequence), absl::StrCat("layer group ", g));
  if (status.ok()) status = lock->sequences.Restore(sequence);
  if (!status.ok()) {
    for (Place* place : sequence->durable.places) lock->store.Unkeep(place);
    sequence->durable = {};
    for (GroupTable& table : sequence->groups) table.blocks->Clear();
    return status;
  }
  sequence->durable.exists = true;
  sequence->durable.tokens = sequence->MinTokens();
  lock->durable_sequences++;
  report->sequences++;
  report->tokens += sequence->MinTokens();
  report->blocks += sequence->durable.places.size();
  for (const Place* place : sequence->durable.places) report->bytes += lock->store.BlockAt(*place)->bytes();
  lock->prefixes.Register(*sequence, core_.options().max_prefix_blocks, nullptr);
  PrefixIndex::ForgetKeys(*sequence);
  return absl::OkStatus();
}

// A prefix that was durable when its sequence was closed. What was dropped later may be another's by now: it
// is left out, or its label tells.
absl::Status Persister::RestoreRun(CacheLock& lock, const std::string& bytes, RestoreReport* report,
                                   Returned* returned) {
  returned->end = BlockStore::End::kColdest;  // its end goes first
  KVTIDE_ASSIGN_OR_RETURN(const Manifest manifest, Decode(bytes));
  returned->priority = manifest.options.priority;
  last_written_ = std::max(last_written_, manifest.written_unix_nanos);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, Rebuild(lock, manifest));
  if (!sequence->chain.has_value())
    return absl::FailedPreconditionError("this build tells tokens apart in another way");
  BlockStore& store = lock->store;
  PrefixSpace& space = *sequence->prefixes;
  auto run = std::make_unique<PrefixRun>();
  run->id = manifest.id;
  run->written = manifest.written_unix_nanos;
  for (size_t g = 0; g < manifest.groups.size(); g++) {
    const ManifestGroup& group = manifest.groups[g];
    KVTIDE_RETURN_IF_ERROR(CheckCoding(group, sequence->groups[g]));
    for (size_t b = 0; b < group.blocks.size(); b++) {
      if (lock->prefixes.blocks() >= core_.options().max_prefix_blocks) break;
      const ManifestBlock& from = group.blocks[b];
      const BlockKey& key = manifest.chain_keys[static_cast<size_t>(group.first_block) + b];
      Block* block = lock->prefixes.Get(space, key, static_cast<int>(g));
      if (block == nullptr) {
        WritingBlock guard;
        block = RestoreBlock(lock, manifest, g, b, *sequence, &guard);
        if (block == nullptr || block->prefix() != nullptr) continue;
        lock->prefixes.Insert(space, key, static_cast<int>(g), block);
        returned->blocks.push_back(block);
      }
      Place* const place = DurablePlace(lock->store, *block);
      if (place == nullptr || place->offset != from.offset || place->Written().write_id != from.write_id)
        continue;
      run->blocks.emplace_back(block->id, place);
    }
  }
  if (run->blocks.empty()) return absl::NotFoundError("none of its blocks is there any more");
  for (const auto& [id, place] : run->blocks) store.Keep(place);
  report->prefix_blocks += run->blocks.size();
  lock->prefixes.EnterRun(std::move(run));
  return absl::OkStatus();
}

// Bytes that another build wrote in another way are never read.
absl::Status Persister::CheckCoding(const ManifestGroup& group, const GroupTable& table) {
  const CachePair pair = table.coded->pair();
  if (group.pair != PairName(pair) || group.codec_version_k != Info(pair.k).version ||
      group.codec_version_v != Info(pair.v).version || group.exact_layout != HashLayout(*table.exact) ||
      group.coded_layout != HashLayout(*table.coded))
    return absl::FailedPreconditionError(
        absl::StrCat("it was stored as ", group.pair, " by codec versions ", group.codec_version_k, " and ",
                     group.codec_version_v, "; this build has ", PairName(pair), ", ", Info(pair.k).version,
                     " and ", Info(pair.v).version, ", or another order of bytes"));
  if (group.rungs != Rungs(table))
    return absl::FailedPreconditionError(
        "it may have been recoded for room (degrade) by other codec versions than this build's, or to "
        "another "
        "order of bytes");
  return absl::OkStatus();
}

// The block of the manifest as it lies in the durable tier: a new one under a guard, or one that another
// manifest has named before. Null where it does not lie inside of the tier, over another one, or without its
// profile.
Block* Persister::RestoreBlock(CacheLock& lock, const Manifest& manifest, size_t group_index, size_t at,
                               const Sequence& sequence, WritingBlock* guard) {
  BlockStore& store = lock->store;
  const ManifestGroup& group = manifest.groups[group_index];
  const ManifestBlock& from = group.blocks[at];
  const GroupTable& table = sequence.groups[group_index];
  const BlockLayout* const layout = LayoutOf(from, table);
  const auto& places = store.tier(tier_).places;
  if (const auto there = places.find(from.offset); there != places.end()) {
    Block* const block = store.BlockAt(*there->second);
    const bool same = block != nullptr && there->second->Written().write_id == from.write_id &&
                      block->layout() == layout && block->home() == sequence.home &&
                      block->checksum == from.checksum;
    return same ? block : nullptr;
  }
  const std::shared_ptr<const Profile> profile =
      from.profile < 0 ? nullptr : group.profiles[static_cast<size_t>(from.profile)];
  if (!CheckProfileFor(layout->pair().k, layout->shape(), profile.get()).ok()) return nullptr;
  Block* const block = store.AllocateAt(tier_, from.offset, sequence.home, layout);
  if (block == nullptr) return nullptr;
  *guard = WritingBlock(store, block);
  block->checked = false;
  block->has_checksum = true;
  block->checksum = from.checksum;
  Stamp(store, block, sequence, static_cast<int>(group_index), group.first_block + static_cast<int64_t>(at),
        profile);
  block->sequence = from.writer;
  block->place->Written().write_id = from.write_id;
  block->place->Written().checksum = from.checksum;
  block->place->Written().profile_hash = profile != nullptr ? profile->hash : 0;
  return block;
}

absl::Status Persister::RestoreGroup(CacheLock& lock, const Manifest& manifest, size_t index,
                                     Sequence& sequence) {
  BlockStore& store = lock->store;
  const ManifestGroup& group = manifest.groups[index];
  GroupTable& table = sequence.groups[index];
  KVTIDE_RETURN_IF_ERROR(CheckCoding(group, table));
  table.profile = group.profile < 0 ? nullptr : group.profiles[static_cast<size_t>(group.profile)];
  table.sealed = group.sealed;
  table.blocks->StartAt(group.first_block);
  for (size_t b = 0; b < group.blocks.size(); b++) {
    WritingBlock guard;
    Block* const block = RestoreBlock(lock, manifest, index, b, sequence, &guard);
    if (block == nullptr)
      return absl::DataLossError(absl::StrCat("block ", group.first_block + static_cast<int64_t>(b), " ",
                                              WhyNotRestored(store.tier(tier_), group.blocks[b], table)));
    table.blocks->PushBack(block, sequence.recency.own);
    store.Keep(block->place);
    sequence.durable.places.push_back(block->place);
  }
  for (size_t l = 0; l < group.layers.size(); l++) table.SetLayer(static_cast<int>(l), group.layers[l]);
  std::fill(table.profiled.begin(), table.profiled.end(), true);
  return absl::OkStatus();
}

}  // namespace kvtide
