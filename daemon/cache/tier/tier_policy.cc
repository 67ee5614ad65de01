#include "daemon/cache/tier/tier_policy.h"

#include <algorithm>

#include "absl/container/flat_hash_set.h"

namespace kvtide {
namespace {

size_t Fraction(size_t capacity, double share) {
  return static_cast<size_t>(static_cast<double>(capacity) * share);
}

class RoomPicker {
 public:
  explicit RoomPicker(const Snapshot& snapshot)
      : snapshot_(snapshot), tiers_(snapshot.tiers), room_(tiers_.size()), next_(tiers_.size()) {
    for (size_t t = 0; t < tiers_.size(); t++) room_[t] = tiers_[t].room_bytes;
  }

  bool MakeRoom(size_t tier, size_t bytes) {
    if (bytes > tiers_[tier].capacity_bytes) return false;
    Recode(tier, bytes, snapshot_.cold);
    while (room_[tier] < bytes) {
      if (next_[tier] == tiers_[tier].coldest.size()) {
        Recode(tier, bytes, absl::ZeroDuration());
        return room_[tier] >= bytes;
      }
      const BlockView& block = tiers_[tier].coldest[next_[tier]++];
      if (recoded_.contains(block.id)) continue;
      // A tier below that is full of what may not move is passed over.
      size_t below = snapshot_.Below(tier);
      while (below < tiers_.size() && !MakeRoom(below, block.bytes)) below = snapshot_.Below(below);
      if (below < tiers_.size()) {
        moves_.push_back({block.id, static_cast<int>(tier), static_cast<int>(below)});
        room_[below] -= block.bytes;
      } else if (block.droppable) {
        Recode(tier, bytes, absl::ZeroDuration());
        if (room_[tier] >= bytes) break;
        if (recoded_.contains(block.id)) continue;
        moves_.push_back({block.id, static_cast<int>(tier), kDropTier});
      } else {
        continue;
      }
      room_[tier] += block.bytes;
    }
    return true;
  }
  // What was untouched for so long, until the bytes fit.
  void Recode(size_t tier, size_t bytes, absl::Duration untouched) {
    for (const BlockView& block : tiers_[tier].recodable) {
      if (room_[tier] >= bytes) return;
      if (block.idle < untouched || !recoded_.insert(block.id).second) continue;
      moves_.push_back({block.id, static_cast<int>(tier), kRecode});
      room_[tier] += block.bytes - block.recoded_bytes;
    }
  }
  std::vector<Move> Take() { return std::move(moves_); }
  std::vector<Move> TakeRecodes() {
    std::erase_if(moves_, [](const Move& move) { return move.to != kRecode; });
    return Take();
  }

 private:
  const Snapshot& snapshot_;
  const std::vector<TierView>& tiers_;
  std::vector<size_t> room_;
  std::vector<size_t> next_;  // into coldest
  absl::flat_hash_set<BlockId> recoded_;
  std::vector<Move> moves_;
};

}  // namespace

std::vector<Move> PickMoves(const Snapshot& snapshot, const TierLimits& limits, size_t max_moves) {
  std::vector<Move> moves;
  std::vector<size_t> used(snapshot.tiers.size());
  for (size_t t = 0; t < used.size(); t++) used[t] = snapshot.tiers[t].used_bytes;

  for (size_t t = 0; t < used.size(); t++) {
    const size_t target = snapshot.Below(t);
    const TierView& tier = snapshot.tiers[t];
    if (used[t] <= Fraction(tier.capacity_bytes, limits.high_watermark)) continue;
    bool recodes = false;
    for (const BlockView& block : tier.recodable) {
      if (used[t] <= Fraction(tier.capacity_bytes, limits.low_watermark) || moves.size() == max_moves) break;
      if (block.idle < limits.idle) continue;
      moves.push_back({block.id, static_cast<int>(t), kRecode});
      used[t] -= block.bytes - block.recoded_bytes;
      recodes = true;
    }
    // There may be more to recode than was looked at.
    if (recodes || target >= used.size()) continue;
    const TierView& below = snapshot.tiers[target];
    for (const BlockView& block : tier.coldest) {
      if (used[t] <= Fraction(tier.capacity_bytes, limits.low_watermark) || moves.size() == max_moves) break;
      if (block.idle < limits.idle || used[target] + block.bytes > below.capacity_bytes) continue;
      moves.push_back({block.id, static_cast<int>(t), static_cast<int>(target)});
      used[t] -= block.bytes;
      used[target] += block.bytes;
    }
  }
  if (!limits.promote_on_attend) return moves;
  for (size_t t = snapshot.homes; t < used.size(); t++) {
    for (const BlockView& block : snapshot.tiers[t].wanted) {
      if (moves.size() == max_moves) break;
      const size_t target = snapshot.Above(t, block);
      const size_t limit = Fraction(snapshot.tiers[target].capacity_bytes, limits.promote_below);
      if (used[target] + block.bytes > limit) continue;
      const auto demoted = [&](const Move& move) { return move.block == block.id; };
      if (std::any_of(moves.begin(), moves.end(), demoted)) continue;
      moves.push_back({block.id, static_cast<int>(t), static_cast<int>(target)});
      used[target] += block.bytes;
      used[t] -= block.bytes;
    }
  }
  return moves;
}

int PickHome(const std::vector<HomeView>& homes) {
  size_t used = 0, filled = 0;
  for (const HomeView& home : homes) {
    used += home.used_bytes;
    filled += home.sequences - home.empty_sequences;
  }
  const double each = filled > 0 ? static_cast<double>(used) / static_cast<double>(filled) : 0;
  const auto room = [&](const HomeView& home) {
    return static_cast<double>(home.free_bytes) - each * static_cast<double>(home.empty_sequences);
  };
  size_t best = 0;
  for (size_t h = 1; h < homes.size(); h++) {
    const double mine = room(homes[h]), other = room(homes[best]);
    if (mine > other || (mine == other && homes[h].sequences < homes[best].sequences)) best = h;
  }
  return static_cast<int>(best);
}

std::vector<Move> PickRoom(const Snapshot& snapshot, int tier, size_t bytes) {
  RoomPicker picker(snapshot);
  return picker.MakeRoom(static_cast<size_t>(tier), bytes) ? picker.Take() : picker.TakeRecodes();
}

std::vector<Move> PickRecodes(const Snapshot& snapshot, int tier, size_t bytes) {
  RoomPicker picker(snapshot);
  const auto t = static_cast<size_t>(tier);
  picker.Recode(t, bytes, snapshot.Below(t) < snapshot.tiers.size() ? snapshot.cold : absl::ZeroDuration());
  return picker.Take();
}

}  // namespace kvtide
