#include "daemon/cache/move/room_maker.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "daemon/cache/call/refusal.h"
#include "daemon/cache/move/move_batch.h"
#include "daemon/cache/move/room_text.h"
#include "kernels/base/check.h"

namespace kvtide {
namespace {

constexpr uint64_t kAnySerial = ~uint64_t{0};
constexpr size_t kPeeks = 4096;          // blocks of a tier that are looked at to make room once
constexpr size_t kStretch = 2048;        // extents that are looked at to make a hole, at least
constexpr size_t kLongStretch = 65'536;  // at most, for blocks that are many times as large as others
// A byte over the bus costs as much as so many inside the tier; one that is in use will come back.
constexpr double kIdleDemotion = 4, kHotDemotion = 16;

}  // namespace

void LetOthers(CacheLock& lock) {
  const Unlocked unlocked(lock);
  // Without a pause the mutex would be taken again before a waiting thread wakes up.
  std::this_thread::sleep_for(std::chrono::microseconds(20));
}

WritingBlock RoomMaker::AllocateIn(CacheLock& lock, int tier, int home, const BlockLayout* layout,
                                   size_t want_bytes) {
  constexpr int kRounds = 64;  // others may take the room that was made
  KeepSpare(lock, tier, layout->block_bytes());
  for (int round = 0; round < kRounds; round++) {
    Block* block = lock->store.Allocate(tier, home, layout);
    if (block != nullptr) return WritingBlock(lock->store, block);
    if (!MakeRoom(lock, tier, layout->block_bytes(), want_bytes, kAnySerial)) break;
  }
  return {};
}

int RoomiestHome(const BlockStore& store) {
  int home = 0;
  for (int h = 1; h < store.homes(); h++)
    if (store.tier(h).allocator.free_bytes() > store.tier(home).allocator.free_bytes()) home = h;
  return home;
}

WritingBlock RoomMaker::AllocateCached(CacheLock& lock, const std::shared_ptr<TenantAccount>& account,
                                       int home, const BlockForm& form, size_t want_bytes, bool* over_quota) {
  BlockStore& store = lock->store;
  std::vector<int> tiers;
  for (int t = store.homes(); t < static_cast<int>(store.tiers()); t++)
    if (core_.attends(t)) tiers.push_back(t);
  tiers.push_back(home);
  constexpr int kRounds = 64;  // others may take the room that was made
  for (const int tier : tiers) {
    KeepSpare(lock, tier, form.bytes);
    for (int round = 0; round < kRounds; round++) {
      // What the tenant has cached makes way for it, and nobody else's.
      if (form.bytes > store.QuotaLeft(*account, tier) && !DropCached(*lock, *account, tier, form.bytes)) {
        *over_quota = true;
        break;
      }
      Block* const block = store.Allocate(tier, home, form);
      if (block != nullptr) {
        store.SetAccount(block, account);
        return WritingBlock(store, block);
      }
      if (!MakeRoom(lock, tier, form.bytes, want_bytes, kAnySerial)) break;
    }
  }
  return {};
}

absl::StatusOr<std::vector<WritingBlock>> RoomMaker::Allocate(CacheLock& lock, int home,
                                                              std::span<const BlockLayout* const> layouts,
                                                              size_t want_bytes,
                                                              const TenantAccount* account) {
  size_t bytes = 0;
  for (const BlockLayout* layout : layouts) bytes += layout->block_bytes();
  const absl::Time deadline = core_.options().clock() + core_.options().room_wait;
  const int tiers = static_cast<int>(core_.tiers());
  while (true) {
    bool over_quota = false;
    for (int t = home; t < tiers; t = lock->store.Below(t)) {
      if (!core_.attends(t)) continue;  // new blocks are written where a backend can
      if (account != nullptr && bytes > lock->store.QuotaLeft(*account, t) &&
          !DropCached(*lock, *account, t, bytes)) {
        over_quota = true;
        continue;
      }
      std::vector<WritingBlock> blocks;
      while (blocks.size() < layouts.size()) {
        WritingBlock block = AllocateIn(lock, t, home, layouts[blocks.size()], want_bytes);
        if (!block) break;
        blocks.push_back(std::move(block));
      }
      if (blocks.size() == layouts.size()) return blocks;
    }
    // Nobody else's moves and calls make room in a quota.
    if (over_quota)
      return Refused(Refusal::kQuota, absl::ResourceExhaustedError(
                                          OverQuotaText(*lock, bytes, *account, core_.options().clock())));
    const absl::Duration left = deadline - core_.options().clock();
    if ((lock->moves_running == 0 && lock->attends_running == 0) || left <= absl::ZeroDuration())
      return absl::ResourceExhaustedError(NoRoomText(*lock, bytes, account, core_.options().clock()));
    lock.WaitForChange(left);
  }
}

// What the tenant has cached makes way for what it needs.
bool RoomMaker::DropCached(CacheState& state, const TenantAccount& account, int tier, size_t bytes) const {
  constexpr int kMostCachedPeeks = 1 << 16;  // a millisecond or two, in which nobody else has the mutex
  std::vector<BlockId> cached;
  const uint64_t left = state.store.QuotaLeft(account, tier);
  size_t found = 0;
  int peeks = 0;
  state.store.PeekIdle(tier, kAnySerial, [&](const Block& block) {
    if (++peeks > kMostCachedPeeks) return false;
    if (block.account() != &account || !BlockStore::IsCachedOnly(block) || !block.droppable()) return true;
    cached.push_back(block.id);
    found += block.place->extent();
    return left + found < bytes;
  });
  if (left + found < bytes) return false;
  MoveReport ignored;
  for (const BlockId id : cached) Drop(state, {id, tier, kDropTier}, &ignored);
  return bytes <= state.store.QuotaLeft(account, tier);
}

void RoomMaker::ViewRoom(const Tier& tier, bool gathered, TierView* view) {
  view->capacity_bytes = tier.allocator.capacity_bytes();
  view->used_bytes = tier.allocator.used_bytes();
  view->room_bytes = gathered && tier.attends() ? tier.allocator.free_bytes() : tier.LargestRoom();
  if (tier.io == nullptr || tier.io->Writable()) return;
  view->used_bytes = view->capacity_bytes;
  view->room_bytes = 0;
}

void RoomMaker::ViewRoomBelow(const CacheState& state, int tier, bool gathered, TierView* view) {
  ViewRoom(state.store.tier(tier), gathered, view);
  if (state.store.recodable_blocks() == 0 || !state.store.tier(tier).attends() || state.store.HasBelow(tier))
    return;
  const size_t spare = std::min(state.sequences.spare_bytes(), view->room_bytes);
  view->room_bytes -= spare;
  view->used_bytes += spare;
}

namespace {

// What it may be recoded as; null: nothing now. What is durable as it is goes down for nothing, and comes
// back whole; who has a lease was told what its blocks are.
const BlockLayout* NextRung(const Block& block) {
  return block.has_backup || block.leases > 0 ? nullptr : block.kind->NextRung();
}

}  // namespace

BlockView RoomMaker::View(const BlockStore& store, const Block& block, absl::Time now) {
  BlockView view{block.id, block.bytes(), block.droppable(), now - store.LastTouched(block), block.home()};
  if (const BlockLayout* const rung = NextRung(block); rung != nullptr)
    view.recoded_bytes = rung->block_bytes();
  return view;
}

std::vector<BlockView> RoomMaker::ViewRecodable(const BlockStore& store, int tier, size_t bytes,
                                                uint64_t before_serial, absl::Time now) {
  if (store.recodable_blocks() == 0 || !store.tier(tier).attends()) return {};
  constexpr size_t kColdest = 1024;
  struct Candidate {
    BlockView view;
    size_t offset;
  };
  std::vector<Candidate> candidates;
  size_t peeks = 0;
  store.PeekIdle(tier, before_serial, [&](const Block& block) {
    const BlockView view = View(store, block, now);
    if (view.recoded_bytes > 0) candidates.push_back({view, block.place->offset});
    return ++peeks < kColdest;
  });
  // Nothing goes down a second rung while others that are cold stand on the first.
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.view.bytes > b.view.bytes; });
  size_t gain = 0, count = 0;
  while (count < candidates.size() && gain < bytes) {
    gain += candidates[count].view.bytes - candidates[count].view.recoded_bytes;
    count++;
  }
  candidates.resize(count);
  // Side by side, what each leaves free is one piece with what the one before has left.
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.offset < b.offset; });
  std::vector<BlockView> views;
  views.reserve(count);
  for (const Candidate& candidate : candidates) views.push_back(candidate.view);
  return views;
}

Snapshot RoomMaker::View(const CacheState& state, int first_tier, size_t bytes, uint64_t before_serial,
                         Free free) const {
  const BlockStore& store = state.store;
  Snapshot snapshot;
  snapshot.homes = static_cast<size_t>(store.homes());
  snapshot.cold = core_.options().limits.idle;
  const absl::Time now = core_.options().clock();
  const bool dropping =
      state.sequences.dropping_sequences() > 0 || state.keyed.blocks() > 0 || state.store.alone_bytes() > 0;
  for (size_t t = 0; t < store.tiers(); t++) {
    const Tier& tier = store.tier(static_cast<int>(t));
    TierView& view = snapshot.tiers.emplace_back();
    if (static_cast<int>(t) == first_tier) {
      ViewRoom(tier, free == Free::kGathered, &view);
    } else {
      ViewRoomBelow(state, static_cast<int>(t), free == Free::kGathered, &view);
    }
    if (tier.io != nullptr && !tier.io->Writable())
      continue;  // nothing has to leave it for what it will not take
    if (static_cast<int>(t) != first_tier && static_cast<int>(t) < store.Below(first_tier)) continue;
    // Enough of any kind and enough that may be dropped; the last tier only drops.
    const bool last = !store.HasBelow(static_cast<int>(t));
    view.recodable = ViewRecodable(store, static_cast<int>(t), bytes, before_serial, now);
    if (last && !dropping) continue;
    size_t any = 0, droppable = 0, peeks = 0;
    store.PeekIdle(static_cast<int>(t), before_serial, [&](const Block& block) {
      if (++peeks > kPeeks) return false;
      const BlockView candidate = View(store, block, now);
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

// A block is recoded into free bytes beside it: in a tier that is full to the last of them nothing could be.
void RoomMaker::KeepSpare(CacheLock& lock, int tier, size_t bytes) {
  const size_t want = bytes + lock->sequences.spare_bytes();
  if (lock->store.recodable_blocks() == 0 || !core_.attends(tier) ||
      lock->store.tier(tier).allocator.LargestFreeExtent() >= want)
    return;
  const std::vector<Move> moves =
      PickRecodes(View(*lock, tier, want, kAnySerial, Free::kInOnePiece), tier, want);
  Execute(lock, moves, false, kAnySerial);
}

bool RoomMaker::MakeRoom(CacheLock& lock, int tier, size_t bytes, size_t want_bytes, uint64_t before_serial) {
  // Pieces that are free count as one at first: as a rule they can be gathered, and less has to go.
  return MakeHole(lock, tier, bytes, Search::kNear, before_serial) ||
         Demote(lock, tier, bytes, want_bytes, before_serial, Free::kGathered) ||
         Demote(lock, tier, bytes, want_bytes, before_serial, Free::kInOnePiece) ||
         MakeHole(lock, tier, bytes, Search::kWholeTier, before_serial);
}

bool RoomMaker::MakeFree(CacheLock& lock, int tier, size_t bytes, size_t want_bytes, uint64_t before_serial) {
  return Demote(lock, tier, bytes, want_bytes, before_serial, Free::kGathered);
}

bool RoomMaker::Demote(CacheLock& lock, int tier, size_t bytes, size_t want_bytes, uint64_t before_serial,
                       Free free) {
  const size_t want = std::max(bytes, std::min(want_bytes, bytes * core_.options().max_moves_in_flight));
  Snapshot snapshot = View(*lock, tier, 2 * want, before_serial, free);
  while (true) {
    std::vector<Move> moves = PickRoom(snapshot, tier, want);
    if (moves.empty() && want > bytes) moves = PickRoom(snapshot, tier, bytes);
    const bool recodes =
        std::any_of(moves.begin(), moves.end(), [](const Move& move) { return move.to == kRecode; });
    const MoveReport report = Execute(lock, moves, false, before_serial);
    if (report.moved_blocks + report.dropped_blocks + report.degraded_blocks > 0) return true;
    if (!recodes) return false;
    // A block is recoded into free bytes beside it, and there were none.
    for (TierView& view : snapshot.tiers) view.recodable.clear();
  }
}

bool RoomMaker::Drop(CacheState& state, const Move& move, MoveReport* report) const {
  Block* block = state.store.Get(move.block);
  if (block == nullptr || !state.store.IsIdle(*block) || block->place->tier != move.from ||
      !block->droppable())
    return false;
  if (core_.options().remote != nullptr && core_.options().remote_writes == RemoteWrites::kOnDemote &&
      BlockStore::IsCachedOnly(*block) && !block->offered)
    state.unsent.left_out++;
  state.store.Drop(block);
  state.counters.dropped_blocks++;
  report->dropped_blocks++;
  state.changed.NotifyAll();
  return true;
}

MoveReport RoomMaker::Execute(CacheLock& lock, std::span<const Move> moves, bool read_too,
                              uint64_t before_serial, const Cancellation* cancellation) {
  BlockStore& store = lock->store;
  MoveReport report;
  MoveBatch batch(lock, &report, cancellation);
  // The block, if it still lies where the move begins and may leave.
  const auto find = [&](const Move& move) -> Block* {
    Block* block = store.Get(move.block);
    const bool there = block != nullptr && block->place != nullptr && block->place->tier == move.from &&
                       block->used() && !block->writing && !block->moving;
    return there && (read_too || store.IsIdle(*block)) ? block : nullptr;
  };
  for (const Move& move : moves) {
    if (move.to == kDropTier) {
      if (!Drop(*lock, move, &report)) report.left_blocks++;
      continue;
    }
    if (move.to == kRecode) {
      Recode(lock, move, before_serial, batch, &report);
      continue;
    }
    Block* block = find(move);
    if (block != nullptr && !block->has_backup && !store.MayLie(*block, move.to)) {
      // A cached block that its tenant has no room for below makes way altogether.
      if (!read_too && Drop(*lock, {move.block, move.from, kDropTier}, &report)) continue;
      report.left_blocks++;
      continue;
    }
    if (block != nullptr && block->has_backup && store.Backup(*block)->tier == move.to) {
      // Its bytes are there already.
      report.moved_blocks++;
      store.tier(move.from).demoted++;
      store.MoveToBackup(block);
      lock->changed.NotifyAll();
      continue;
    }
    Place* target = block != nullptr ? store.Reserve(move.to, *block) : nullptr;
    if (block != nullptr && target == nullptr) {
      // Earlier moves of the list make the room, or it is there in pieces. The mutex was free: look again.
      const size_t bytes = block->bytes();
      batch.Finish();
      MakeHole(lock, move.to, bytes, Search::kNear, before_serial);
      block = find(move);
      target = block != nullptr ? store.Reserve(move.to, *block) : nullptr;
    }
    if (target == nullptr) {
      report.left_blocks++;
      continue;
    }
    batch.Start(block, target);
    if (batch.full()) batch.Finish();
  }
  batch.Finish();
  return report;
}

void RoomMaker::Recode(CacheLock& lock, const Move& move, uint64_t before_serial, MoveBatch& batch,
                       MoveReport* report) {
  BlockStore& store = lock->store;
  Place* target = nullptr;
  const auto reserve = [&]() -> Block* {
    Block* const block = store.Get(move.block);
    const bool there = block != nullptr && block->place != nullptr && block->place->tier == move.from &&
                       block->used() && store.IsIdle(*block);
    const BlockLayout* const rung = there ? NextRung(*block) : nullptr;
    target = rung != nullptr ? store.ReserveAs(rung, *block) : nullptr;
    return rung != nullptr ? block : nullptr;
  };
  Block* block = reserve();
  if (block != nullptr && target == nullptr) {
    const size_t bytes = block->kind->NextRung()->block_bytes();
    batch.Finish();  // gives the room of those before
    MakeHole(lock, move.from, bytes, Search::kNear, before_serial);
    block = reserve();
  }
  if (target == nullptr) {
    report->left_blocks++;
    return;
  }
  batch.StartRecode(block, target, block->kind->NextRung());
  if (batch.full()) batch.Finish();
}

// The extents from about `from` on, and where the next stretch begins (0: the tier has been seen to its end).
// Stretches overlap by `bytes`, so that every hole lies in one of them.
StretchView RoomMaker::ViewStretch(const CacheState& state, int tier_index, size_t from, size_t bytes,
                                   uint64_t before_serial, size_t* next) const {
  const BlockStore& store = state.store;
  const Tier& tier = store.tier(tier_index);
  const absl::Time now = core_.options().clock();
  StretchView stretch;
  auto place = tier.places.lower_bound(from);
  size_t end = 0;
  if (place != tier.places.begin()) end = std::prev(place)->first + std::prev(place)->second->extent();
  stretch.offset = end;
  if (store.HasBelow(tier_index)) {
    TierView below;
    ViewRoomBelow(state, store.Below(tier_index), true, &below);
    stretch.room_below = below.room_bytes;
    stretch.largest_below = std::min(below.room_bytes, store.tier(store.Below(tier_index)).LargestRoom());
  }
  const auto add_free = [&](size_t until) {
    if (until > end) stretch.extents.push_back({ExtentView::Kind::kFree, until - end});
  };
  for (; place != tier.places.end(); ++place) {
    const size_t extents = stretch.extents.size();
    if (extents >= kLongStretch || (extents >= kStretch && end - stretch.offset >= 4 * bytes)) break;
    add_free(place->first);
    const Block* block = store.BlockAt(*place->second);
    ExtentView& view = stretch.extents.emplace_back();
    view.kind = ExtentView::Kind::kFixed;
    view.bytes = place->second->extent();
    end = place->first + view.bytes;
    if (block == nullptr || !store.IsIdle(*block) || !block->used()) continue;
    view.kind = ExtentView::Kind::kMovable;
    view.block = block->id;
    const bool idle = now - store.LastTouched(*block) >= core_.options().limits.idle;
    view.demotion_cost = store.TouchSerial(*block) >= before_serial
                             ? -1
                             : static_cast<double>(view.bytes) * (idle ? kIdleDemotion : kHotDemotion);
  }
  *next = 0;
  if (place == tier.places.end()) {
    add_free(tier.allocator.capacity_bytes());
  } else {
    *next = std::max(stretch.offset + 1, end - std::min(end, bytes));
  }
  return stretch;
}

bool RoomMaker::MakeHole(CacheLock& lock, int tier, size_t bytes, Search search, uint64_t before_serial) {
  constexpr int kNearStretches = 4;
  const ExtentAllocator& allocator = lock->store.tier(tier).allocator;
  const size_t need = ExtentAllocator::RoundUp(lock->store.tier(tier).ExtentBytes(bytes));
  // To gather pieces by I/O would cost more than it gives.
  if (!core_.attends(tier)) return allocator.LargestFreeExtent() >= need;
  next_stretch_.resize(core_.tiers());
  size_t from = search == Search::kNear ? next_stretch_[static_cast<size_t>(tier)] : 0;
  for (int seen = 0; search == Search::kWholeTier || seen < kNearStretches; seen++) {
    if (allocator.LargestFreeExtent() >= need) return true;
    if (allocator.free_bytes() < need) return false;
    if (seen > 0) LetOthers(lock);
    const StretchView stretch = ViewStretch(*lock, tier, from, need, before_serial, &from);
    next_stretch_[static_cast<size_t>(tier)] = from;
    const std::optional<HolePlan> plan = PlanHole(stretch, need);
    if (plan.has_value()) Dig(lock, tier, *plan);
    if (from == 0) break;
  }
  return allocator.LargestFreeExtent() >= need;
}

// Clears the hole. Its bytes are claimed as they become free, so that nobody takes them meanwhile.
void RoomMaker::Dig(CacheLock& lock, int tier, const HolePlan& plan) {
  BlockStore& store = lock->store;
  struct Claims {
    BlockStore& store;
    std::vector<Place*> places;
    ~Claims() {
      for (Place* place : places) store.Retire(place);
    }
  } claims{store, {}};
  const size_t end = plan.offset + plan.bytes;
  const auto claim_free = [&] {
    std::vector<std::pair<size_t, size_t>> extents;
    store.tier(tier).allocator.Peek(plan.offset, [&](size_t offset, size_t bytes) {
      if (offset < end) extents.emplace_back(offset, std::min(bytes, end - offset));
      return offset < end;
    });
    for (const auto& [offset, bytes] : extents) claims.places.push_back(store.Claim(tier, offset, bytes));
  };
  claim_free();
  MoveReport ignored;
  MoveBatch batch(lock, &ignored);
  const auto finish = [&] {
    batch.Finish();
    claim_free();
  };
  for (const HoleMove& move : plan.moves) {
    Block* block = store.Get(move.block);
    if (block == nullptr || !store.IsIdle(*block) || !block->used() || block->place->tier != tier ||
        block->place->offset < plan.offset || block->place->offset >= end)
      continue;
    Place* target = move.to.has_value() ? store.ReserveAt(tier, *move.to, *block)
                                        : store.Reserve(store.Below(tier), *block);
    if (target == nullptr) continue;
    batch.Start(block, target);
    if (batch.full()) finish();
  }
  finish();
}

}  // namespace kvtide
