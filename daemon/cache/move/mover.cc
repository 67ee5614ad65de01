#include "daemon/cache/move/mover.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "daemon/cache/move/move_batch.h"
#include "daemon/cache/sequence/table_walk.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint64_t kAnySerial = ~uint64_t{0};
constexpr size_t kMostWanted = 4096;  // blocks that one round looks at; whoever reads on wants them again
constexpr size_t kSlice = 1024;       // table entries that a verb looks at before it gives the mutex up

bool IsBusy(const Block& block) { return block.writing || block.moving; }

}  // namespace

void Mover::Stop() {
  {
    CacheLock lock(core_);
    stopping_ = true;
    wake_.NotifyAll();
  }
  if (thread_.joinable()) thread_.join();
  if (io_thread_.joinable()) io_thread_.join();
}

void Mover::Start() {
  for (int t = 0; t < static_cast<int>(core_.tiers()) && !io_thread_.joinable(); t++)
    if (!core_.attends(t)) io_thread_ = std::thread([this] { RunIo(); });
  thread_ = std::thread([this] { Run(); });
}

void Mover::Run() {
  while (true) {
    {
      CacheLock lock(core_);
      if (!stopping_) lock.Wait(wake_, core_.options().move_interval);
      if (stopping_) return;
    }
    RunOnce();
  }
}

void Mover::RunIo() {
  CacheLock lock(core_);
  while (!stopping_) {
    if (io_.empty()) lock.Wait(wake_, core_.options().move_interval);
    const std::vector<Move> batch =
        stopping_ ? std::vector<Move>{} : io_.Next(core_.options().max_moves_in_flight);
    if (batch.empty()) continue;
    room_.Execute(lock, batch, true, lock->store.serial() + 1);
    io_.Done();
  }
}

absl::Status Mover::WaitUntilStill(CacheLock& lock, const Block& block) const {
  const CacheOptions& options = core_.options();
  const absl::Time deadline = options.clock() + options.room_wait;
  while (block.moving) {
    const absl::Duration left = deadline - options.clock();
    if (left <= absl::ZeroDuration())
      return absl::AbortedError(absl::StrCat("a block is being moved between tiers for longer than ",
                                             absl::FormatDuration(options.room_wait),
                                             " (room_wait); nothing has changed, try again"));
    lock.WaitForChange(left);
  }
  return absl::OkStatus();
}

absl::Status Mover::Copy(CacheLock& lock, const Block& block, const Place& from, const Place& to) {
  CopyJob job(lock->store, block, from, to);
  const Unlocked unlocked(lock);
  CopyAll(core_, {&job, 1});
  return job.status;
}

absl::Status Mover::Check(const CallContext& context, const char* what, const MoveReport& report) const {
  const absl::Status status = context.Check(core_.options().clock(), what);
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(status.message(), "; by then it had moved ",
                                                  report.moved_blocks, " blocks (", report.moved_bytes,
                                                  " bytes) and dropped ", report.dropped_blocks));
}

absl::StatusOr<std::vector<SequencePtr>> Mover::FindAll(const CacheState& state,
                                                        std::span<const SequenceId> ids,
                                                        const CallContext& context) const {
  const size_t limit = core_.options().max_sequences;
  if (ids.size() > limit)
    return absl::InvalidArgumentError(absl::StrCat(ids.size(), " sequence ids: at most ", limit,
                                                   " sequences are open at a time (max_sequences)"));
  return state.sequences.FindAll(ids, context);
}

MoveReport Mover::MoveTo(CacheLock& lock, std::span<const HeldBlock> blocks, int tier, uint64_t before_serial,
                         const Cancellation* cancellation) {
  size_t bytes = 0, largest = 0;
  std::vector<Move> moves;
  for (const HeldBlock& held : blocks) {
    const Block& block = *held.get();
    if (!block.used() || block.place == nullptr || block.place->tier == tier) continue;
    bytes += block.bytes();
    largest = std::max(largest, block.bytes());
    moves.push_back({block.id, block.place->tier, tier});
  }
  // Room for all of them if it can be made; without it, what fits.
  const ExtentAllocator& allocator = lock->store.tier(tier).allocator;
  constexpr int kRounds = 64;
  for (int round = 0; round < kRounds && allocator.free_bytes() < bytes; round++)
    if (!room_.MakeFree(lock, tier, allocator.free_bytes() + largest, bytes, before_serial)) break;
  return room_.Execute(lock, moves, true, before_serial, cancellation);
}

namespace {

// What is dropped and recoded while it lives, to make room for what is moved, whosesoever it is: the report
// gets it.
class MadeRoom {
 public:
  MadeRoom(const CacheState& state, MoveReport* report)
      : state_(state),
        report_(report),
        dropped_(state.counters.dropped_blocks),
        degraded_(Degraded()),
        before_(*report) {}
  ~MadeRoom() {
    report_->dropped_blocks = before_.dropped_blocks + state_.counters.dropped_blocks - dropped_;
    report_->degraded_blocks = before_.degraded_blocks + Degraded() - degraded_;
  }
  MadeRoom(const MadeRoom&) = delete;
  MadeRoom& operator=(const MadeRoom&) = delete;

 private:
  uint64_t Degraded() const {
    uint64_t sum = 0;
    for (size_t t = 0; t < state_.store.tiers(); t++) sum += state_.store.tier(static_cast<int>(t)).degraded;
    return sum;
  }

  const CacheState& state_;
  MoveReport* const report_;
  const uint64_t dropped_, degraded_;
  const MoveReport before_;
};

}  // namespace

// One call of Evict: what may leave, slice by slice.
class Mover::Eviction {
 public:
  // `all`: no sequence that is not named exists, so none is disturbed.
  Eviction(Mover& mover, CacheLock& lock, const std::vector<SequencePtr>& sequences, int tier, bool all)
      : mover_(mover), lock_(lock), sequences_(sequences), tier_(tier), all_(all) {}

  absl::StatusOr<MoveReport> Run(const CallContext& context) {
    for (const SequencePtr& sequence : sequences_) lock_->store.Unwant(sequence->recency);
    KVTIDE_RETURN_IF_ERROR(CountEntries(context));
    TableWalk walk(sequences_);
    while (true) {
      std::vector<HeldBlock> blocks;
      const bool more = walk.Next(kSlice, [&](Block* block) { Look(block, &blocks); });
      KVTIDE_RETURN_IF_ERROR(Move(blocks, context));
      if (!more) return report_;
      LetOthers(lock_);
    }
  }

 private:
  // How often the named sequences have each shared block: one that others have, too, stays. Parking one
  // branch must not slow the others.
  absl::Status CountEntries(const CallContext& context) {
    if (all_) return absl::OkStatus();
    TableWalk walk(sequences_);
    while (walk.Next(kSlice, [&](const Block* block) {
      if (block->references() > 1) entries_[block->id]++;
    })) {
      KVTIDE_RETURN_IF_ERROR(mover_.Check(context, "the eviction", report_));
      LetOthers(lock_);
    }
    return absl::OkStatus();
  }

  void Look(Block* block, std::vector<HeldBlock>* blocks) {
    const BlockStore& store = lock_->store;
    // Blocks here or below stay; no device is below another.
    const int lowest = tier_ < store.homes() ? 0 : tier_;
    if (block->place == nullptr || (tier_ != kDropTier && block->place->tier >= lowest)) return;
    if (block->references() > 1 && !seen_.insert(block->id).second) return;
    if (!all_ && block->references() > 1 && block->references() > entries_[block->id]) {
      report_.shared_blocks++;
    } else if (IsBusy(*block) || (tier_ == kDropTier && block->leases > 0)) {
      report_.left_blocks++;
    } else if (tier_ == kDropTier) {
      lock_->store.Drop(block);
      lock_->counters.dropped_blocks++;
      report_.dropped_blocks++;
    } else {
      blocks->emplace_back(lock_->store, block);
    }
  }

  absl::Status Move(const std::vector<HeldBlock>& blocks, const CallContext& context) {
    if (tier_ == kDropTier) lock_->changed.NotifyAll();
    const size_t step = mover_.core_.options().max_moves_in_flight;
    for (size_t begin = 0; begin < blocks.size(); begin += step) {
      KVTIDE_RETURN_IF_ERROR(mover_.Check(context, "the eviction", report_));
      const MadeRoom made(*lock_, &report_);
      report_ += mover_.MoveTo(lock_, std::span(blocks).subspan(begin, std::min(step, blocks.size() - begin)),
                               tier_, kAnySerial);
    }
    return mover_.Check(context, "the eviction", report_);
  }

  Mover& mover_;
  CacheLock& lock_;
  const std::vector<SequencePtr>& sequences_;
  const int tier_;
  const bool all_;
  absl::flat_hash_map<BlockId, int> entries_;  // of shared blocks
  absl::flat_hash_set<BlockId> seen_;          // shared blocks
  MoveReport report_;
};

absl::StatusOr<MoveReport> Mover::Evict(std::span<const SequenceId> ids, int tier,
                                        const CallContext& context) {
  CacheLock lock(core_);
  KVTIDE_RETURN_IF_ERROR(CheckTier(tier));
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<SequencePtr> sequences, FindAll(*lock, ids, context));
  if (tier == kDropTier)
    for (const SequencePtr& sequence : sequences)
      if (!sequence->options.allow_drop)
        return absl::FailedPreconditionError(
            absl::StrCat("sequence ", sequence->id,
                         " was created without allow_drop; evict it to a lower tier or close it"));
  lock->counters.evict_calls++;
  return Eviction(*this, lock, sequences, tier, false).Run(context);
}

absl::StatusOr<MoveReport> Mover::EvictAll(int tier, const CallContext& context) {
  CacheLock lock(core_);
  KVTIDE_RETURN_IF_ERROR(CheckTier(tier));
  std::vector<SequencePtr> sequences;
  for (const auto& [id, sequence] : lock->sequences.all())
    if (context.identity->MaySee(sequence->options.name_space) &&
        (tier != kDropTier || sequence->options.allow_drop))
      sequences.push_back(sequence);
  lock->counters.evict_calls++;
  return Eviction(*this, lock, sequences, tier, tier != kDropTier).Run(context);
}

absl::Status Mover::CheckTier(int tier) const {
  const int tiers = static_cast<int>(core_.tiers());
  if (tier >= kDropTier && tier < tiers) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tier ", tier, ": there are tiers 0 to ", tiers - 1));
}

absl::StatusOr<MoveReport> Mover::Prefetch(std::span<const SequenceId> ids, const CallContext& context) {
  CacheLock lock(core_);
  BlockStore& store = lock->store;
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<SequencePtr> sequences, FindAll(*lock, ids, context));
  lock->counters.prefetch_calls++;
  const uint64_t before_serial = store.serial() + 1;  // only what was touched earlier makes way
  const absl::Time now = core_.options().clock();
  MoveReport report;
  // All of them are touched first, so that none makes way for another.
  for (const SequencePtr& sequence : sequences) {
    sequence->last_used = now;
    store.Touch(sequence->recency, now);
  }
  const size_t step = core_.options().max_moves_in_flight;
  absl::flat_hash_set<BlockId> seen;  // shared blocks
  TableWalk walk(sequences);
  while (true) {
    std::vector<std::vector<HeldBlock>> blocks(static_cast<size_t>(store.homes()));
    const bool more = walk.Next(kSlice, [&](Block* block) {
      if (block->place == nullptr || block->place->tier < store.homes()) return;
      if (block->references() > 1 && !seen.insert(block->id).second) return;
      blocks[static_cast<size_t>(block->home())].emplace_back(store, block);
    });
    for (int home = 0; home < store.homes(); home++) {
      const std::span<const HeldBlock> held = blocks[static_cast<size_t>(home)];
      for (size_t begin = 0; begin < held.size(); begin += step) {
        KVTIDE_RETURN_IF_ERROR(Check(context, "the prefetch", report));
        const MadeRoom made(*lock, &report);
        report += MoveTo(lock, held.subspan(begin, std::min(step, held.size() - begin)), home, before_serial);
      }
    }
    KVTIDE_RETURN_IF_ERROR(Check(context, "the prefetch", report));
    if (!more) return report;
    LetOthers(lock);
  }
}

// A tier and as many of its coldest idle blocks as may move in a round, if it is above the high watermark,
// and as many for what is to come up here and finds no room.
TierView Mover::ViewIdle(const CacheState& state, int tier_index, size_t wanted_bytes, absl::Time now) const {
  constexpr size_t kPeeks = 1024;
  const BlockStore& store = state.store;
  const Tier& tier = store.tier(tier_index);
  TierView view;
  RoomMaker::ViewRoomBelow(state, tier_index, false, &view);
  const auto capacity = static_cast<double>(view.capacity_bytes);
  const size_t used = tier.allocator.used_bytes();
  const bool full = static_cast<double>(used) > state.limits.high_watermark * capacity;
  if (full) {
    const auto low = static_cast<size_t>(state.limits.low_watermark * capacity);
    view.recodable = RoomMaker::ViewRecodable(store, tier_index, used - std::min(used, low), kAnySerial, now);
  }
  if (!store.HasBelow(tier_index)) return view;
  size_t most = full ? core_.options().max_moves_in_flight : 0;
  if (wanted_bytes > 0 &&
      static_cast<double>(used + wanted_bytes) > core_.options().limits.promote_below * capacity)
    most += core_.options().max_moves_in_flight;
  if (most == 0) return view;
  size_t peeks = 0;
  store.PeekIdle(tier_index, kAnySerial, [&](const Block& block) {
    view.coldest.push_back(RoomMaker::View(store, block, now));
    return view.coldest.size() < most && ++peeks < kPeeks;
  });
  return view;
}

MoveReport Mover::RunOnce() {
  CacheLock lock(core_);
  BlockStore& store = lock->store;
  const absl::Time now = core_.options().clock();
  lock->keyed.ExpireLeases(now);
  lock->sequences.ApplyPins(now);
  const uint64_t before_serial = store.serial() + 1;  // what is used from now on stays
  Snapshot snapshot;
  snapshot.homes = static_cast<size_t>(store.homes());
  std::vector<std::vector<BlockView>> wanted(store.tiers());
  std::vector<size_t> wanted_bytes(store.tiers());  // by the tier that they are to come to
  for (const Block* block : store.TakeWanted(kMostWanted)) {
    if (IsBusy(*block)) continue;
    const auto from = static_cast<size_t>(block->place->tier);
    wanted[from].push_back(RoomMaker::View(store, *block, now));
    wanted_bytes[snapshot.Above(from, wanted[from].back())] += block->bytes();
  }
  for (size_t t = 0; t < store.tiers(); t++) {
    snapshot.tiers.push_back(ViewIdle(*lock, static_cast<int>(t), wanted_bytes[t], now));
    snapshot.tiers.back().wanted = std::move(wanted[t]);
  }
  TierLimits limits = core_.options().limits;
  limits.high_watermark = lock->limits.high_watermark;
  limits.low_watermark = lock->limits.low_watermark;
  std::vector<Move> moves = PickMoves(snapshot, limits, kSlice);
  if (!io_thread_.joinable()) return room_.Execute(lock, moves, true, before_serial);
  const auto io =
      std::stable_partition(moves.begin(), moves.end(), [&](const Move& move) { return !IsIo(move); });
  io_.Take(std::span(io, moves.end()));
  if (io != moves.end()) wake_.NotifyAll();
  moves.erase(io, moves.end());
  return room_.Execute(lock, moves, true, before_serial);
}

}  // namespace kvtide
