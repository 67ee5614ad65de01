// Room and moves: allocation that demotes or drops by policy, eviction and prefetch on request, and the
// mover.
#include <xxhash.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include "absl/strings/str_cat.h"
#include "daemon/cache/kv_cache_impl.h"
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

std::string KvCache::Impl::RoomText(size_t bytes) const {
  std::string text = absl::StrCat("no room for ", bytes, " bytes:");
  for (size_t t = 0; t < store_.tiers(); t++) {
    const Tier& tier = store_.tier(static_cast<int>(t));
    absl::StrAppend(&text, t == 0 ? " " : "; ", "tier '", tier.name, "'",
                    store_.homes() > 1 ? absl::StrCat(" on ", tier.device) : "", " has ",
                    tier.allocator.free_bytes(), " of ", tier.allocator.capacity_bytes(),
                    " bytes free, the largest extent is ", tier.allocator.LargestFreeExtent());
  }
  absl::StrAppend(&text, ". Close or truncate sequences, or give a tier more memory");
  return text;
}

absl::Status KvCache::Impl::WaitUntilStill(const Block* block) {
  const absl::Time deadline = options_.clock() + options_.room_wait;
  while (block->moving) {
    const absl::Duration left = deadline - options_.clock();
    if (left <= absl::ZeroDuration())
      return absl::AbortedError(absl::StrCat("a block is being moved between tiers for longer than ",
                                             absl::FormatDuration(options_.room_wait),
                                             " (room_wait); nothing has changed, try again"));
    changed_.WaitFor(mu_, absl::ToChronoNanoseconds(left));
  }
  return absl::OkStatus();
}

Block* KvCache::Impl::AllocateIn(int tier, int home, const BlockLayout* layout, size_t want_bytes) {
  constexpr int kRounds = 64;  // others may take the room that was made
  for (int round = 0; round < kRounds; round++) {
    Block* block = store_.Allocate(tier, home, layout);
    if (block != nullptr) return block;
    if (!MakeRoom(tier, layout->block_bytes(), want_bytes, kAnySerial)) return nullptr;
  }
  return nullptr;
}

absl::Status KvCache::Impl::AllocateTogether(int home, std::span<const BlockLayout* const> layouts,
                                             size_t want_bytes, Block** blocks) {
  size_t bytes = 0;
  for (const BlockLayout* layout : layouts) bytes += layout->block_bytes();
  const absl::Time deadline = options_.clock() + options_.room_wait;
  while (true) {
    for (int t = home; t < static_cast<int>(store_.tiers()); t = store_.Below(t)) {
      size_t got = 0;
      while (got < layouts.size()) {
        blocks[got] = AllocateIn(t, home, layouts[got], want_bytes);
        if (blocks[got] == nullptr) break;
        got++;
      }
      if (got == layouts.size()) return absl::OkStatus();
      while (got > 0) {
        blocks[--got]->writing = false;
        store_.Unhold(blocks[got]);
        blocks[got] = nullptr;
      }
    }
    const absl::Duration left = deadline - options_.clock();
    if ((moves_running_ == 0 && attends_running_ == 0) || left <= absl::ZeroDuration())
      return absl::ResourceExhaustedError(RoomText(bytes));
    changed_.WaitFor(mu_, absl::ToChronoNanoseconds(left));
  }
}

BlockView KvCache::Impl::View(const Block& block, absl::Time now) const {
  return {block.id, block.place->bytes, block.refs > 0 && block.keepers == 0, now - block.last_touched,
          block.home};
}

Snapshot KvCache::Impl::RoomSnapshot(int first_tier, size_t bytes, uint64_t before_serial) const {
  Snapshot snapshot;
  snapshot.homes = static_cast<size_t>(store_.homes());
  const absl::Time now = options_.clock();
  for (size_t t = 0; t < store_.tiers(); t++) {
    const Tier& tier = store_.tier(static_cast<int>(t));
    TierView& view = snapshot.tiers.emplace_back();
    view.capacity_bytes = tier.allocator.capacity_bytes();
    view.used_bytes = tier.allocator.used_bytes();
    view.largest_free_bytes = tier.allocator.LargestFreeExtent();
    if (static_cast<int>(t) != first_tier && static_cast<int>(t) < store_.Below(first_tier)) continue;
    // Enough of any kind and enough that may be dropped; the last tier only drops.
    const bool last = !store_.HasBelow(static_cast<int>(t));
    if (last && dropping_sequences_ == 0) continue;
    size_t any = 0, droppable = 0;
    tier.policy->Peek([&](BlockId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      const Block& block = *store_.Get(id);
      if (!BlockStore::IsIdle(block) || block.touch_serial >= before_serial) return true;
      const BlockView candidate = View(block, now);
      if (last && !candidate.droppable) return true;
      if (any >= bytes && !candidate.droppable) return true;
      view.coldest.push_back(candidate);
      any += candidate.bytes;
      if (candidate.droppable) droppable += candidate.bytes;
      return any < bytes || (dropping_sequences_ > 0 && droppable < bytes);
    });
  }
  return snapshot;
}

bool KvCache::Impl::MakeRoom(int tier, size_t bytes, size_t want_bytes, uint64_t before_serial) {
  const size_t want = std::max(bytes, std::min(want_bytes, bytes * options_.max_moves_in_flight));
  const Snapshot snapshot = RoomSnapshot(tier, 2 * want, before_serial);
  std::vector<Move> moves = PickRoom(snapshot, tier, want);
  if (moves.empty() && want > bytes) moves = PickRoom(snapshot, tier, bytes);
  if (moves.empty()) return false;
  const MoveReport report = Execute(moves, false);
  return report.moved_blocks + report.dropped_blocks > 0;
}

MoveReport KvCache::Impl::Execute(const std::vector<Move>& moves, bool pinned_too) {
  struct Running {
    Block* block;
    Place* target;
    bool corrupt;
  };
  MoveReport report;
  std::vector<Running> running;
  std::vector<CopyJob> jobs;
  const auto finish = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (running.empty()) return;
    moves_running_++;
    std::vector<uint64_t> checksums(jobs.size(), 0);
    std::vector<char> verify(jobs.size(), 0), compute(jobs.size(), 0);
    for (size_t i = 0; i < jobs.size(); i++) {
      verify[i] = running[i].block->has_checksum ? 1 : 0;
      checksums[i] = running[i].block->checksum;
      compute[i] = store_.tier(jobs[i].to).checksum ? 1 : 0;
    }
    mu_.Unlock();
    for (size_t i = 0; i < jobs.size(); i++)
      running[i].corrupt = verify[i] != 0 && XXH3_64bits(jobs[i].source, jobs[i].bytes) != checksums[i];
    CopyAll(jobs);
    for (size_t i = 0; i < jobs.size(); i++)
      if (compute[i] != 0 && jobs[i].status.ok()) checksums[i] = XXH3_64bits(jobs[i].target, jobs[i].bytes);
    mu_.Lock();
    moves_running_--;
    for (size_t i = 0; i < jobs.size(); i++) {
      Block* block = running[i].block;
      block->moving = false;
      if (running[i].corrupt) {
        counters_.checksum_failures++;
        store_.Retire(running[i].target);
        if (block->place != nullptr) store_.Drop(block);
        report.left_blocks++;
      } else if (!jobs[i].status.ok()) {
        counters_.failed_moves++;
        store_.Retire(running[i].target);
        report.left_blocks++;
      } else {
        store_.SwapPlace(block, running[i].target);
        block->has_checksum = compute[i] != 0;
        block->checksum = checksums[i];
        if (jobs[i].to > jobs[i].from) {
          store_.tier(jobs[i].from).demoted++;
        } else {
          store_.tier(jobs[i].to).promoted++;
        }
        counters_.moves++;
        counters_.moved_bytes += jobs[i].bytes;
        report.moved_blocks++;
        report.moved_bytes += jobs[i].bytes;
      }
      store_.Unhold(block);
    }
    running.clear();
    jobs.clear();
    changed_.NotifyAll();
  };
  for (const Move& move : moves) {
    Block* block = store_.Get(move.block);
    if (block == nullptr || block->place == nullptr || block->writing || block->moving || block->refs == 0 ||
        block->place->tier != move.from || (!pinned_too && block->place->pins > 0)) {
      report.left_blocks++;
      continue;
    }
    if (move.to == kDropTier) {
      if (block->keepers > 0) {
        report.left_blocks++;
        continue;
      }
      store_.Drop(block);
      counters_.dropped_blocks++;
      report.dropped_blocks++;
      changed_.NotifyAll();
      continue;
    }
    Place* target = store_.Reserve(move.to, *block);
    if (target == nullptr && !running.empty()) {
      // Earlier moves of the list make the room. The mutex is free meanwhile, so everything is looked at
      // again.
      finish();
      block = store_.Get(move.block);
      if (block == nullptr || !BlockStore::IsIdle(*block) || block->refs == 0 ||
          block->place->tier != move.from) {
        report.left_blocks++;
        continue;
      }
      target = store_.Reserve(move.to, *block);
    }
    if (target == nullptr) {
      report.left_blocks++;
      continue;
    }
    block->moving = true;
    store_.Hold(block);
    running.push_back({block, target, false});
    jobs.push_back({move.from, move.to, block->place->data, target->data, target->bytes, {}});
    if (jobs.size() >= options_.max_moves_in_flight) finish();
  }
  finish();
  return report;
}

void KvCache::Impl::CopyAll(std::span<CopyJob> jobs) const {
  struct Ticket {
    size_t job;
    Backend* backend;
    CopyTicket ticket;
  };
  std::vector<Ticket> tickets;
  for (size_t j = 0; j < jobs.size(); j++) {
    CopyJob& job = jobs[j];
    std::vector<CopyPiece> pieces;
    for (size_t begin = 0; begin < job.bytes; begin += options_.move_piece_bytes)
      pieces.push_back(
          {job.target + begin, job.source + begin, std::min(options_.move_piece_bytes, job.bytes - begin)});
    // The faster tier's backend copies: it is the one that may not be host memory.
    Backend* backend = backends_[static_cast<size_t>(std::min(job.from, job.to))];
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

absl::Status KvCache::Impl::CopyOne(CopyJob job) {
  mu_.Unlock();
  CopyAll({&job, 1});
  mu_.Lock();
  return job.status;
}

MoveReport KvCache::Impl::MoveTo(const std::vector<Block*>& blocks, int tier, uint64_t before_serial) {
  MoveReport report;
  const auto wants = [&](const Block& block) {
    return block.refs > 0 && block.place != nullptr && block.place->tier != tier;
  };
  bool room = true;
  for (size_t begin = 0; begin < blocks.size(); begin += options_.max_moves_in_flight) {
    const size_t end = std::min(blocks.size(), begin + options_.max_moves_in_flight);
    size_t bytes = 0, largest = 0;
    std::vector<Move> moves;
    for (size_t i = begin; i < end; i++) {
      if (!wants(*blocks[i])) continue;
      bytes += blocks[i]->place->bytes;
      largest = std::max(largest, blocks[i]->place->bytes);
      moves.push_back({blocks[i]->id, blocks[i]->place->tier, tier});
    }
    if (moves.empty()) continue;
    // Room for the whole step if it can be made; without it, what fits.
    const ExtentAllocator& allocator = store_.tier(tier).allocator;
    for (int round = 0;
         round < 64 && room && (allocator.free_bytes() < bytes || allocator.LargestFreeExtent() < largest);
         round++)
      room = MakeRoom(tier, allocator.free_bytes() + largest, bytes, before_serial);
    // Blocks are held, so their ids are still theirs; Execute looks at the rest again.
    report += Execute(moves, true);
  }
  for (Block* block : blocks) store_.Unhold(block);
  return report;
}

absl::StatusOr<MoveReport> KvCache::Impl::Evict(std::span<const SequenceId> ids, int tier) {
  MutexLock lock(mu_);
  std::vector<SequencePtr> sequences;
  for (const SequenceId id : ids) {
    KVTIDE_ASSIGN_OR_RETURN(SequencePtr sequence, Find(id));
    if (std::find(sequences.begin(), sequences.end(), sequence) == sequences.end())
      sequences.push_back(std::move(sequence));
  }
  return EvictLocked(sequences, tier);
}

absl::StatusOr<MoveReport> KvCache::Impl::EvictAll(int tier) {
  MutexLock lock(mu_);
  std::vector<SequencePtr> sequences;
  for (const auto& [id, sequence] : sequences_)
    if (tier != kDropTier || sequence->options.allow_drop) sequences.push_back(sequence);
  return EvictLocked(sequences, tier);
}

absl::StatusOr<MoveReport> KvCache::Impl::EvictLocked(const std::vector<SequencePtr>& sequences, int tier) {
  if (tier < kDropTier || tier >= static_cast<int>(store_.tiers()))
    return absl::InvalidArgumentError(
        absl::StrCat("tier ", tier, ": there are tiers 0 to ", store_.tiers() - 1));
  counters_.evict_calls++;
  const int lowest =
      tier < store_.homes() ? 0 : tier;  // blocks here or below stay; no device is below another
  if (tier == kDropTier)
    for (const SequencePtr& sequence : sequences)
      if (!sequence->options.allow_drop)
        return absl::FailedPreconditionError(
            absl::StrCat("sequence ", sequence->id,
                         " was created without allow_drop; evict it to a lower tier or close it"));
  std::vector<Block*> order;
  std::map<Block*, int> entries;
  for (const SequencePtr& sequence : sequences)
    for (GroupTable& table : sequence->groups) {
      for (Block* block : table.blocks)
        if (entries[block]++ == 0) order.push_back(block);
      for (auto& [index, block] : table.staging)
        if (entries[block]++ == 0) order.push_back(block);
    }
  MoveReport report;
  std::vector<Block*> blocks;
  for (Block* block : order) {
    if (block->place == nullptr || (tier != kDropTier && block->place->tier >= lowest)) continue;
    if (block->refs > entries[block]) {  // parking one branch must not slow the others
      report.shared_blocks++;
    } else if (block->writing || block->moving) {
      report.left_blocks++;
    } else if (tier == kDropTier) {
      store_.Drop(block);
      counters_.dropped_blocks++;
      report.dropped_blocks++;
    } else {
      block->wanted = false;
      store_.Hold(block);
      blocks.push_back(block);
    }
  }
  if (tier == kDropTier) {
    changed_.NotifyAll();
    return report;
  }
  const uint64_t dropped_before = counters_.dropped_blocks;
  report += MoveTo(blocks, tier, kAnySerial);
  report.dropped_blocks += counters_.dropped_blocks - dropped_before;
  return report;
}

absl::StatusOr<MoveReport> KvCache::Impl::Prefetch(std::span<const SequenceId> ids) {
  MutexLock lock(mu_);
  std::vector<SequencePtr> sequences;
  for (const SequenceId id : ids) {
    KVTIDE_ASSIGN_OR_RETURN(SequencePtr sequence, Find(id));
    sequences.push_back(std::move(sequence));
  }
  counters_.prefetch_calls++;
  const uint64_t before_serial = store_.serial() + 1;  // only what was touched earlier makes way
  const absl::Time now = options_.clock();
  std::vector<std::vector<Block*>> blocks(static_cast<size_t>(store_.homes()));
  std::set<Block*> seen;
  for (const SequencePtr& sequence : sequences) {
    sequence->last_used = now;
    for (GroupTable& table : sequence->groups)
      for (Block* block : table.blocks) {
        if (block->place == nullptr) continue;
        store_.Touch(block, now);
        if (block->place->tier < store_.homes() || !seen.insert(block).second) continue;
        store_.Hold(block);
        blocks[static_cast<size_t>(block->home)].push_back(block);
      }
  }
  MoveReport report;
  for (int home = 0; home < store_.homes(); home++)
    report += MoveTo(blocks[static_cast<size_t>(home)], home, before_serial);
  return report;
}

MoveReport KvCache::Impl::RunMovesOnce() {
  MutexLock lock(mu_);
  Snapshot snapshot;
  snapshot.homes = static_cast<size_t>(store_.homes());
  const absl::Time now = options_.clock();
  const TierLimits& limits = options_.limits;
  for (size_t t = 0; t < store_.tiers(); t++) {
    const Tier& tier = store_.tier(static_cast<int>(t));
    TierView& view = snapshot.tiers.emplace_back();
    view.capacity_bytes = tier.allocator.capacity_bytes();
    view.used_bytes = tier.allocator.used_bytes();
    view.largest_free_bytes = tier.allocator.LargestFreeExtent();
    const bool full = static_cast<double>(view.used_bytes) >
                      limits.high_watermark * static_cast<double>(view.capacity_bytes);
    if (!full || !store_.HasBelow(static_cast<int>(t))) continue;
    tier.policy->Peek([&](BlockId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      const Block& block = *store_.Get(id);
      if (BlockStore::IsIdle(block)) view.coldest.push_back(View(block, now));
      return view.coldest.size() < options_.max_moves_in_flight;
    });
  }
  for (const BlockId id : wanted_) {
    Block* block = store_.Get(id);
    if (block == nullptr || !block->wanted) continue;
    block->wanted = false;
    if (block->place != nullptr && block->place->tier >= store_.homes() && !block->writing &&
        !block->moving && block->refs > 0)
      snapshot.tiers[static_cast<size_t>(block->place->tier)].wanted.push_back(View(*block, now));
  }
  wanted_.clear();
  const std::vector<Move> moves = PickMoves(snapshot, limits, std::numeric_limits<size_t>::max());
  if (moves.empty()) return {};
  return Execute(moves, true);
}

void KvCache::Impl::RunMover() {
  while (true) {
    {
      MutexLock lock(mu_);
      if (!stopping_) mover_wake_.WaitFor(mu_, absl::ToChronoNanoseconds(options_.move_interval));
      if (stopping_) return;
    }
    RunMovesOnce();
  }
}

}  // namespace kvtide
