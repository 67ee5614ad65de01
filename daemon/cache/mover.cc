#include "daemon/cache/mover.h"

#include <xxhash.h>

#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint64_t kAnySerial = ~uint64_t{0};

// Waits for copies: short at first, for small blocks; then without burning a core.
class Backoff {
 public:
  void Wait() {
    if (rounds_++ < 16) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(std::min(rounds_, 200)));
    }
  }

 private:
  int rounds_ = 0;
};

}  // namespace

// A block on its way: nobody writes or drops it, its record and its new place stay.
struct Mover::Running {
  HeldBlock block;
  Place* target = nullptr;  // reserved; the block's, or given back
  CopyJob job;
  bool verify = false, compute = false;  // checksums: of the source, of the target
  uint64_t checksum = 0;
  bool corrupt = false;
};

void Mover::Stop() {
  {
    CacheLock lock(core_);
    stopping_ = true;
    wake_.NotifyAll();
  }
  if (thread_.joinable()) thread_.join();
}

void Mover::Start() {
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

std::string Mover::RoomText(const CacheState& state, size_t bytes) {
  std::string text = absl::StrCat("no room for ", bytes, " bytes:");
  for (size_t t = 0; t < state.store.tiers(); t++) {
    const Tier& tier = state.store.tier(static_cast<int>(t));
    absl::StrAppend(&text, t == 0 ? " " : "; ", "tier '", tier.name, "'",
                    state.store.homes() > 1 ? absl::StrCat(" on ", tier.device) : "", " has ",
                    tier.allocator.free_bytes(), " of ", tier.allocator.capacity_bytes(),
                    " bytes free, the largest extent is ", tier.allocator.LargestFreeExtent());
  }
  absl::StrAppend(&text, ". Close or truncate sequences, or give a tier more memory");
  return text;
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

WritingBlock Mover::AllocateIn(CacheLock& lock, int tier, int home, const BlockLayout* layout,
                               size_t want_bytes) {
  constexpr int kRounds = 64;  // others may take the room that was made
  for (int round = 0; round < kRounds; round++) {
    Block* block = lock->store.Allocate(tier, home, layout);
    if (block != nullptr) return WritingBlock(lock->store, block);
    if (!MakeRoom(lock, tier, layout->block_bytes(), want_bytes, kAnySerial)) break;
  }
  return {};
}

absl::StatusOr<std::vector<WritingBlock>> Mover::Allocate(CacheLock& lock, int home,
                                                          std::span<const BlockLayout* const> layouts,
                                                          size_t want_bytes) {
  size_t bytes = 0;
  for (const BlockLayout* layout : layouts) bytes += layout->block_bytes();
  const absl::Time deadline = core_.options().clock() + core_.options().room_wait;
  const int tiers = static_cast<int>(core_.tiers());
  while (true) {
    for (int t = home; t < tiers; t = lock->store.Below(t)) {
      std::vector<WritingBlock> blocks;
      while (blocks.size() < layouts.size()) {
        WritingBlock block = AllocateIn(lock, t, home, layouts[blocks.size()], want_bytes);
        if (!block) break;
        blocks.push_back(std::move(block));
      }
      if (blocks.size() == layouts.size()) return blocks;
    }
    const absl::Duration left = deadline - core_.options().clock();
    if ((lock->moves_running == 0 && lock->attends_running == 0) || left <= absl::ZeroDuration())
      return absl::ResourceExhaustedError(RoomText(*lock, bytes));
    lock.WaitForChange(left);
  }
}

BlockView Mover::View(const Block& block, absl::Time now) {
  return {block.id, block.place->bytes, block.refs > 0 && block.keepers == 0,
          now - BlockStore::LastTouched(block), block.home};
}

Snapshot Mover::RoomSnapshot(const CacheState& state, int first_tier, size_t bytes,
                             uint64_t before_serial) const {
  const BlockStore& store = state.store;
  Snapshot snapshot;
  snapshot.homes = static_cast<size_t>(store.homes());
  const absl::Time now = core_.options().clock();
  const bool dropping = state.sequences.dropping_sequences() > 0;
  for (size_t t = 0; t < store.tiers(); t++) {
    const Tier& tier = store.tier(static_cast<int>(t));
    TierView& view = snapshot.tiers.emplace_back();
    view.capacity_bytes = tier.allocator.capacity_bytes();
    view.used_bytes = tier.allocator.used_bytes();
    view.largest_free_bytes = tier.allocator.LargestFreeExtent();
    if (static_cast<int>(t) != first_tier && static_cast<int>(t) < store.Below(first_tier)) continue;
    // Enough of any kind and enough that may be dropped; the last tier only drops.
    const bool last = !store.HasBelow(static_cast<int>(t));
    if (last && !dropping) continue;
    size_t any = 0, droppable = 0;
    store.Peek(static_cast<int>(t), [&](const Block& block) {
      if (!store.IsIdle(block) || store.TouchSerial(block) >= before_serial) return true;
      const BlockView candidate = View(block, now);
      if (last && !candidate.droppable) return true;
      if (any >= bytes && !candidate.droppable) return true;
      view.coldest.push_back(candidate);
      any += candidate.bytes;
      if (candidate.droppable) droppable += candidate.bytes;
      return any < bytes || (dropping && droppable < bytes);
    });
  }
  return snapshot;
}

bool Mover::MakeRoom(CacheLock& lock, int tier, size_t bytes, size_t want_bytes, uint64_t before_serial) {
  const size_t want = std::max(bytes, std::min(want_bytes, bytes * core_.options().max_moves_in_flight));
  const Snapshot snapshot = RoomSnapshot(*lock, tier, 2 * want, before_serial);
  std::vector<Move> moves = PickRoom(snapshot, tier, want);
  if (moves.empty() && want > bytes) moves = PickRoom(snapshot, tier, bytes);
  if (moves.empty()) return false;
  const MoveReport report = Execute(lock, moves, false);
  return report.moved_blocks + report.dropped_blocks > 0;
}

// Copies what is on its way, without the mutex, and gives every block its new place or leaves it in the old
// one.
void Mover::FinishRound(CacheLock& lock, std::vector<Running>& running, MoveReport& report) {
  if (running.empty()) return;
  lock->moves_running++;
  std::vector<CopyJob> jobs;
  for (const Running& move : running) jobs.push_back(move.job);
  {
    const Unlocked unlocked(lock);
    for (Running& move : running)
      move.corrupt = move.verify && XXH3_64bits(move.job.source, move.job.bytes) != move.checksum;
    CopyAll(jobs);
    for (size_t i = 0; i < jobs.size(); i++)
      if (running[i].compute && jobs[i].status.ok())
        running[i].checksum = XXH3_64bits(jobs[i].target, jobs[i].bytes);
  }
  lock->moves_running--;
  BlockStore& store = lock->store;
  for (size_t i = 0; i < jobs.size(); i++) {
    Running& move = running[i];
    const CopyJob& job = jobs[i];
    Block* block = move.block.get();
    block->moving = false;
    if (move.corrupt) {
      lock->counters.checksum_failures++;
      store.Retire(move.target);
      if (block->place != nullptr) store.Drop(block);
      report.left_blocks++;
    } else if (!job.status.ok()) {
      lock->counters.failed_moves++;
      store.Retire(move.target);
      report.left_blocks++;
    } else {
      store.SwapPlace(block, move.target);
      block->has_checksum = move.compute;
      block->checksum = move.checksum;
      if (job.to > job.from) {
        store.tier(job.from).demoted++;
      } else {
        store.tier(job.to).promoted++;
      }
      lock->counters.moves++;
      lock->counters.moved_bytes += job.bytes;
      report.moved_blocks++;
      report.moved_bytes += job.bytes;
    }
  }
  running.clear();
  lock->changed.NotifyAll();
}

MoveReport Mover::Execute(CacheLock& lock, const std::vector<Move>& moves, bool read_too) {
  BlockStore& store = lock->store;
  MoveReport report;
  std::vector<Running> running;
  // The block of a move, if the move is still possible.
  const auto find = [&](const Move& move, bool reading_too) -> Block* {
    Block* block = store.Get(move.block);
    if (block == nullptr || block->place == nullptr || block->writing || block->moving || block->refs == 0 ||
        block->place->tier != move.from || (!reading_too && !store.IsIdle(*block)))
      return nullptr;
    return block;
  };
  for (const Move& move : moves) {
    Block* block = find(move, read_too);
    if (block == nullptr || (move.to == kDropTier && block->keepers > 0)) {
      report.left_blocks++;
      continue;
    }
    if (move.to == kDropTier) {
      store.Drop(block);
      lock->counters.dropped_blocks++;
      report.dropped_blocks++;
      lock->changed.NotifyAll();
      continue;
    }
    Place* target = store.Reserve(move.to, *block);
    if (target == nullptr && !running.empty()) {
      // Earlier moves of the list make the room.
      FinishRound(lock, running, report);
      block = find(move, false);
      if (block != nullptr) target = store.Reserve(move.to, *block);
    }
    if (target == nullptr) {
      report.left_blocks++;
      continue;
    }
    block->moving = true;
    Running& started = running.emplace_back();
    started.block = HeldBlock(store, block);
    started.target = target;
    started.job = {move.from, move.to, block->place->data, target->data, target->bytes, {}};
    started.verify = block->has_checksum;
    started.checksum = block->checksum;
    started.compute = store.tier(move.to).checksum;
    if (running.size() >= core_.options().max_moves_in_flight) FinishRound(lock, running, report);
  }
  FinishRound(lock, running, report);
  return report;
}

void Mover::CopyAll(std::span<CopyJob> jobs) const {
  struct Ticket {
    size_t job;
    Backend* backend;
    CopyTicket ticket;
  };
  const size_t piece_bytes = core_.options().move_piece_bytes;
  std::vector<Ticket> tickets;
  for (size_t j = 0; j < jobs.size(); j++) {
    CopyJob& job = jobs[j];
    std::vector<CopyPiece> pieces;
    for (size_t begin = 0; begin < job.bytes; begin += piece_bytes)
      pieces.push_back({job.target + begin, job.source + begin, std::min(piece_bytes, job.bytes - begin)});
    // The faster tier's backend copies: it is the one that may not be host memory.
    Backend* backend = &core_.backend(std::min(job.from, job.to));
    const CopyDirection direction = job.from == job.to  ? CopyDirection::kInside
                                    : job.from < job.to ? CopyDirection::kToHost
                                                        : CopyDirection::kFromHost;
    const absl::StatusOr<CopyTicket> ticket = backend->StartCopy(pieces, direction);
    if (ticket.ok()) {
      tickets.push_back({j, backend, *ticket});
    } else {
      job.status = ticket.status();
    }
  }
  Backoff backoff;
  while (!tickets.empty()) {
    const auto done = [&](const Ticket& ticket) {
      const absl::StatusOr<bool> polled = ticket.backend->Poll(ticket.ticket);
      if (!polled.ok()) jobs[ticket.job].status = polled.status();
      return !polled.ok() || *polled;
    };
    tickets.erase(std::remove_if(tickets.begin(), tickets.end(), done), tickets.end());
    if (!tickets.empty()) backoff.Wait();
  }
}

absl::Status Mover::Copy(CacheLock& lock, const Place& from, const Place& to) {
  CopyJob job{from.tier, to.tier, from.data, to.data, from.bytes, {}};
  const Unlocked unlocked(lock);
  CopyAll({&job, 1});
  return job.status;
}

MoveReport Mover::MoveTo(CacheLock& lock, const std::vector<HeldBlock>& blocks, int tier,
                         uint64_t before_serial, const CallContext& context) {
  MoveReport report;
  const size_t step = core_.options().max_moves_in_flight;
  bool room = true;
  for (size_t begin = 0; begin < blocks.size(); begin += step) {
    if (!context.Check(core_.options().clock(), "the move").ok()) break;
    const size_t end = std::min(blocks.size(), begin + step);
    size_t bytes = 0, largest = 0;
    std::vector<Move> moves;
    for (size_t i = begin; i < end; i++) {
      const Block& block = *blocks[i].get();
      if (block.refs == 0 || block.place == nullptr || block.place->tier == tier) continue;
      bytes += block.place->bytes;
      largest = std::max(largest, block.place->bytes);
      moves.push_back({block.id, block.place->tier, tier});
    }
    if (moves.empty()) continue;
    // Room for the whole step if it can be made; without it, what fits.
    const ExtentAllocator& allocator = lock->store.tier(tier).allocator;
    for (int round = 0;
         round < 64 && room && (allocator.free_bytes() < bytes || allocator.LargestFreeExtent() < largest);
         round++)
      room = MakeRoom(lock, tier, allocator.free_bytes() + largest, bytes, before_serial);
    report += Execute(lock, moves, true);
  }
  return report;
}

absl::StatusOr<MoveReport> Mover::Evict(std::span<const SequenceId> ids, int tier,
                                        const CallContext& context) {
  CacheLock lock(core_);
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<SequencePtr> sequences, lock->sequences.FindAll(ids));
  return EvictSequences(lock, sequences, tier, context);
}

absl::StatusOr<MoveReport> Mover::EvictAll(int tier, const CallContext& context) {
  CacheLock lock(core_);
  std::vector<SequencePtr> sequences;
  for (const auto& [id, sequence] : lock->sequences.all())
    if (tier != kDropTier || sequence->options.allow_drop) sequences.push_back(sequence);
  return EvictSequences(lock, sequences, tier, context);
}

absl::StatusOr<MoveReport> Mover::EvictSequences(CacheLock& lock, const std::vector<SequencePtr>& sequences,
                                                 int tier, const CallContext& context) {
  BlockStore& store = lock->store;
  if (tier < kDropTier || tier >= static_cast<int>(store.tiers()))
    return absl::InvalidArgumentError(
        absl::StrCat("tier ", tier, ": there are tiers 0 to ", store.tiers() - 1));
  lock->counters.evict_calls++;
  const int lowest =
      tier < store.homes() ? 0 : tier;  // blocks here or below stay; no device is below another
  if (tier == kDropTier)
    for (const SequencePtr& sequence : sequences)
      if (!sequence->options.allow_drop)
        return absl::FailedPreconditionError(
            absl::StrCat("sequence ", sequence->id,
                         " was created without allow_drop; evict it to a lower tier or close it"));
  std::vector<Block*> order;
  std::map<Block*, int> entries;
  for (const SequencePtr& sequence : sequences)
    for (const GroupTable& table : sequence->groups)
      table.ForEachBlock([&](Block* block) {
        if (entries[block]++ == 0) order.push_back(block);
      });
  MoveReport report;
  std::vector<HeldBlock> blocks;
  for (Block* block : order) {
    if (block->place == nullptr || (tier != kDropTier && block->place->tier >= lowest)) continue;
    if (block->refs > entries[block]) {  // parking one branch must not slow the others
      report.shared_blocks++;
    } else if (block->writing || block->moving) {
      report.left_blocks++;
    } else if (tier == kDropTier) {
      store.Drop(block);
      lock->counters.dropped_blocks++;
      report.dropped_blocks++;
    } else {
      block->wanted = false;
      blocks.emplace_back(store, block);
    }
  }
  if (tier == kDropTier) {
    lock->changed.NotifyAll();
    return report;
  }
  const uint64_t dropped_before = lock->counters.dropped_blocks;
  report += MoveTo(lock, blocks, tier, kAnySerial, context);
  report.dropped_blocks += lock->counters.dropped_blocks - dropped_before;
  KVTIDE_RETURN_IF_ERROR(context.Check(core_.options().clock(), "the eviction"));
  return report;
}

absl::StatusOr<MoveReport> Mover::Prefetch(std::span<const SequenceId> ids, const CallContext& context) {
  CacheLock lock(core_);
  BlockStore& store = lock->store;
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<SequencePtr> sequences, lock->sequences.FindAll(ids));
  lock->counters.prefetch_calls++;
  const uint64_t before_serial = store.serial() + 1;  // only what was touched earlier makes way
  const absl::Time now = core_.options().clock();
  std::vector<std::vector<HeldBlock>> blocks(static_cast<size_t>(store.homes()));
  std::set<Block*> seen;
  for (const SequencePtr& sequence : sequences) {
    sequence->last_used = now;
    for (const GroupTable& table : sequence->groups)
      for (Block* block : table.blocks) {
        if (block->place == nullptr) continue;
        store.Touch(block, now);
        if (block->place->tier < store.homes() || !seen.insert(block).second) continue;
        blocks[static_cast<size_t>(block->home)].emplace_back(store, block);
      }
  }
  MoveReport report;
  for (int home = 0; home < store.homes(); home++)
    report += MoveTo(lock, blocks[static_cast<size_t>(home)], home, before_serial, context);
  KVTIDE_RETURN_IF_ERROR(context.Check(core_.options().clock(), "the prefetch"));
  return report;
}

MoveReport Mover::RunOnce() {
  CacheLock lock(core_);
  BlockStore& store = lock->store;
  Snapshot snapshot;
  snapshot.homes = static_cast<size_t>(store.homes());
  const absl::Time now = core_.options().clock();
  const TierLimits& limits = core_.options().limits;
  for (size_t t = 0; t < store.tiers(); t++) {
    const Tier& tier = store.tier(static_cast<int>(t));
    TierView& view = snapshot.tiers.emplace_back();
    view.capacity_bytes = tier.allocator.capacity_bytes();
    view.used_bytes = tier.allocator.used_bytes();
    view.largest_free_bytes = tier.allocator.LargestFreeExtent();
    const bool full = static_cast<double>(view.used_bytes) >
                      limits.high_watermark * static_cast<double>(view.capacity_bytes);
    if (!full || !store.HasBelow(static_cast<int>(t))) continue;
    store.Peek(static_cast<int>(t), [&](const Block& block) {
      if (store.IsIdle(block)) view.coldest.push_back(View(block, now));
      return view.coldest.size() < core_.options().max_moves_in_flight;
    });
  }
  for (Block* block : store.TakeWanted())
    if (block->place != nullptr && block->place->tier >= store.homes() && !block->writing && !block->moving &&
        block->refs > 0)
      snapshot.tiers[static_cast<size_t>(block->place->tier)].wanted.push_back(View(*block, now));
  const std::vector<Move> moves = PickMoves(snapshot, limits, std::numeric_limits<size_t>::max());
  if (moves.empty()) return {};
  return Execute(lock, moves, true);
}

}  // namespace kvtide
