// Mover::BringIn: blocks out of tiers that do not attend, for a call that is about to compute on them.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "daemon/cache/move/mover.h"
#include "daemon/cache/move/room_text.h"
#include "kernels/base/status.h"

namespace kvtide {

absl::Status Mover::BringIn(CacheLock& lock, Block* block) {
  std::vector<HeldBlock> held;
  held.emplace_back(lock->store, block);
  return BringIn(lock, held, lock->store.serial() + 1, {});
}

absl::Status Mover::BringIn(CacheLock& lock, std::span<const HeldBlock> blocks, uint64_t before_serial,
                            const CallContext& context) {
  BlockStore& store = lock->store;
  const CacheOptions& options = core_.options();
  for (const HeldBlock& held : blocks)
    if (held->record != kNoSlot && store.TouchSerial(*held.get()) < before_serial)
      store.Touch(*held.get(), options.clock());
  const uint64_t failed_before = lock->counters.failed_moves;
  absl::Time deadline = options.clock() + options.room_wait;
  const absl::Time last = options.clock() + options.io_wait;
  size_t far_before = blocks.size() + 1;
  while (true) {
    KVTIDE_RETURN_IF_ERROR(context.Check(options.clock(), "the call, while blocks were brought in"));
    std::vector<HeldBlock> batch;
    size_t far = 0, bytes = 0;
    const Block* moving = nullptr;
    for (const HeldBlock& held : blocks) {
      Block* const block = held.get();
      if (!IsFar(*block) || !block->used()) continue;
      far++;
      bytes += block->bytes();
      if (block->moving) {
        moving = block;
      } else if (batch.size() < options.max_moves_in_flight &&
                 (batch.empty() ||
                  (batch.front()->home() == block->home() && batch.front()->keyed == block->keyed))) {
        batch.emplace_back(store, block);
      }
    }
    if (far == 0) return absl::OkStatus();
    if (far < far_before)
      deadline = options.clock() + options.room_wait;  // others need not be as fast as that
    const bool stuck = far >= far_before;
    far_before = far;
    const absl::Time now = options.clock();
    if (moving != nullptr && (batch.empty() || stuck)) {
      if (now >= last || options.room_wait <= absl::ZeroDuration())
        return absl::AbortedError(absl::StrCat("a block is being moved between tiers for longer than ",
                                               absl::FormatDuration(options.io_wait),
                                               " (io_wait); try again"));
      lock.WaitForChange(std::min(options.room_wait, last - now));
      continue;
    }
    if (stuck) {
      if (lock->counters.failed_moves != failed_before)
        return absl::UnavailableError(absl::StrCat(
            far, " blocks that the call needs could not be copied to where they can be used; try again"));
      // Others may be about to free what is needed.
      const bool others = lock->moves_running > 0 || lock->attends_running > 0;
      if (!others || now >= deadline)
        return absl::ResourceExhaustedError(absl::StrCat(
            far,
            " blocks of the call lie where nobody can compute on them and do not fit into the tiers above: ",
            NoRoomText(*lock, bytes, blocks.front()->account(), options.clock())));
      lock.WaitForChange(deadline - now);
    }
    if (!batch.empty()) BringBatch(lock, batch, batch.front()->home(), before_serial, context.cancellation);
  }
}

size_t Mover::RoomAtHome(const CacheState& state, int home, const TierLimits& limits) {
  const ExtentAllocator& top = state.store.tier(home).allocator;
  const auto limit = static_cast<size_t>(static_cast<double>(top.capacity_bytes()) * limits.promote_below);
  return std::min(limit - std::min(limit, top.used_bytes()), top.free_bytes());
}

void Mover::BringHome(CacheLock& lock, std::span<const HeldBlock> blocks, const CallContext& context) {
  const size_t step = core_.options().max_moves_in_flight;
  for (size_t begin = 0; begin < blocks.size(); begin += step) {
    if (!context.Check(core_.options().clock(), "the call").ok()) return;  // it will say so itself
    std::vector<Move> moves;
    std::vector<size_t> room(static_cast<size_t>(core_.homes()));
    for (int home = 0; home < core_.homes(); home++)
      room[static_cast<size_t>(home)] = RoomAtHome(*lock, home, core_.options().limits);
    for (const HeldBlock& held : blocks.subspan(begin, std::min(step, blocks.size() - begin))) {
      const Block& block = *held.get();
      if (!block.used() || block.place == nullptr || block.place->tier < core_.homes() ||
          !core_.attends(block.place->tier))
        continue;
      size_t& left = room[static_cast<size_t>(block.home())];
      if (block.bytes() > left) continue;
      left -= block.bytes();
      moves.push_back({block.id, block.place->tier, block.home()});
    }
    room_.Execute(lock, moves, true, 0, context.cancellation);
  }
}

void Mover::BringBatch(CacheLock& lock, std::span<const HeldBlock> blocks, int home, uint64_t before_serial,
                       const Cancellation* cancellation) {
  BlockStore& store = lock->store;
  const auto still_far = [&](size_t most_bytes) {
    std::vector<HeldBlock> far;
    size_t bytes = 0;
    for (const HeldBlock& held : blocks) {
      if (!IsFar(*held.get()) || held->moving || held->writing) continue;
      bytes += held->bytes();
      if (bytes > most_bytes) break;
      far.emplace_back(store, held.get());
    }
    return far;
  };
  constexpr size_t kAll = ~size_t{0};
  // Nobody attends over what is found by key: it is wanted in memory, not on the device.
  const size_t room = RoomAtHome(*lock, home, core_.options().limits);
  if (room > 0 && !blocks.front()->keyed) MoveTo(lock, still_far(room), home, before_serial, cancellation);
  for (int t = store.Below(home); t < static_cast<int>(core_.tiers()); t = store.Below(t))
    if (core_.attends(t)) MoveTo(lock, still_far(kAll), t, before_serial, cancellation);
  MoveTo(lock, still_far(kAll), home, before_serial, cancellation);
}

}  // namespace kvtide
