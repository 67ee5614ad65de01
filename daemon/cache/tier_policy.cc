#include "daemon/cache/tier_policy.h"

#include <algorithm>

namespace kvtide {
namespace {

size_t Fraction(size_t capacity, double share) {
  return static_cast<size_t>(static_cast<double>(capacity) * share);
}

class RoomPicker {
 public:
  explicit RoomPicker(const Snapshot& snapshot)
      : tiers_(snapshot.tiers), room_(tiers_.size()), next_(tiers_.size()) {
    for (size_t t = 0; t < tiers_.size(); t++) room_[t] = tiers_[t].largest_free_bytes;
  }

  bool MakeRoom(size_t tier, size_t bytes) {
    if (bytes > tiers_[tier].capacity_bytes) return false;
    while (room_[tier] < bytes) {
      if (next_[tier] == tiers_[tier].coldest.size()) return false;
      const BlockView& block = tiers_[tier].coldest[next_[tier]++];
      if (tier + 1 < tiers_.size() && MakeRoom(tier + 1, block.bytes)) {
        moves_.push_back({block.id, static_cast<int>(tier), static_cast<int>(tier + 1)});
        room_[tier + 1] -= block.bytes;
      } else if (block.droppable) {
        moves_.push_back({block.id, static_cast<int>(tier), kDropTier});
      } else {
        continue;
      }
      room_[tier] += block.bytes;
    }
    return true;
  }
  std::vector<Move> Take() { return std::move(moves_); }

 private:
  const std::vector<TierView>& tiers_;
  std::vector<size_t> room_;
  std::vector<size_t> next_;  // into coldest
  std::vector<Move> moves_;
};

}  // namespace

std::vector<Move> PickMoves(const Snapshot& snapshot, const TierLimits& limits, size_t max_moves) {
  std::vector<Move> moves;
  std::vector<size_t> used(snapshot.tiers.size());
  for (size_t t = 0; t < used.size(); t++) used[t] = snapshot.tiers[t].used_bytes;

  for (size_t t = 0; t + 1 < used.size(); t++) {
    const TierView& tier = snapshot.tiers[t];
    const TierView& below = snapshot.tiers[t + 1];
    if (used[t] <= Fraction(tier.capacity_bytes, limits.high_watermark)) continue;
    for (const BlockView& block : tier.coldest) {
      if (used[t] <= Fraction(tier.capacity_bytes, limits.low_watermark) || moves.size() == max_moves) break;
      if (block.idle < limits.idle || used[t + 1] + block.bytes > below.capacity_bytes) continue;
      moves.push_back({block.id, static_cast<int>(t), static_cast<int>(t + 1)});
      used[t] -= block.bytes;
      used[t + 1] += block.bytes;
    }
  }
  if (!limits.promote_on_attend) return moves;
  for (size_t t = 1; t < used.size(); t++) {
    const size_t limit = Fraction(snapshot.tiers[t - 1].capacity_bytes, limits.promote_below);
    for (const BlockView& block : snapshot.tiers[t].wanted) {
      if (moves.size() == max_moves) break;
      if (used[t - 1] + block.bytes > limit) continue;
      const auto demoted = [&](const Move& move) { return move.block == block.id; };
      if (std::any_of(moves.begin(), moves.end(), demoted)) continue;
      moves.push_back({block.id, static_cast<int>(t), static_cast<int>(t - 1)});
      used[t - 1] += block.bytes;
      used[t] -= block.bytes;
    }
  }
  return moves;
}

std::vector<Move> PickRoom(const Snapshot& snapshot, int tier, size_t bytes) {
  RoomPicker picker(snapshot);
  if (!picker.MakeRoom(static_cast<size_t>(tier), bytes)) return {};
  return picker.Take();
}

}  // namespace kvtide
