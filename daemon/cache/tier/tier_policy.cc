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

class MovePicker {
 public:
  MovePicker(const Snapshot& snapshot, const TierLimits& limits)
      : snapshot_(snapshot), tiers_(snapshot.tiers), limits_(limits), used_(tiers_.size()) {
    for (size_t t = 0; t < tiers_.size(); t++) {
      used_[t] = tiers_[t].used_bytes;
      for (const BlockView& block : tiers_[t].wanted) stay_.insert(block.id);
    }
    // What goes down in exchange leaves as much for the watermark.
    for (const TierView& tier : tiers_) {
      const bool full = tier.used_bytes > Fraction(tier.capacity_bytes, limits.high_watermark);
      exchanges_.push_back(full ? (tier.coldest.size() + 1) / 2 : tier.coldest.size());
    }
  }

  // Up to so many moves in all.
  void Promote(size_t most) {
    for (size_t t = snapshot_.homes; t < tiers_.size(); t++)
      for (const BlockView& block : tiers_[t].wanted) {
        if (moves_.size() >= most) return;
        if (promoted_.contains(block.id)) continue;
        const size_t target = snapshot_.Above(t, block);
        if (used_[target] + block.bytes <= Fraction(tiers_[target].capacity_bytes, limits_.promote_below)) {
          Add(block, t, target);
        } else if (!Exchange(block, t, target, most)) {
          continue;
        }
        promoted_.insert(block.id);
      }
  }

  void Demote(size_t most) {
    for (size_t t = 0; t < tiers_.size(); t++) {
      const size_t target = snapshot_.Below(t);
      if (tiers_[t].used_bytes <= Fraction(tiers_[t].capacity_bytes, limits_.high_watermark)) continue;
      // There may be more to recode than was looked at.
      if (Recode(t, most) || target >= tiers_.size()) continue;
      for (const BlockView& block : tiers_[t].coldest) {
        if (used_[t] <= Fraction(tiers_[t].capacity_bytes, limits_.low_watermark) || moves_.size() >= most)
          break;
        if (MayGoDown(block) && used_[target] + block.bytes <= tiers_[target].capacity_bytes)
          Demote(block, t, target);
      }
    }
  }

  std::vector<Move> Take() { return std::move(moves_); }

 private:
  bool MayGoDown(const BlockView& block) const {
    return block.idle >= limits_.idle && !stay_.contains(block.id);
  }
  void Add(const BlockView& block, size_t from, size_t to) {
    moves_.push_back({block.id, static_cast<int>(from), static_cast<int>(to)});
    used_[from] -= block.bytes;
    used_[to] += block.bytes;
  }
  // Idle blocks of the tier, where they may be, until it is at the low watermark. Whether there were any.
  bool Recode(size_t tier, size_t most) {
    const size_t before = moves_.size();
    for (const BlockView& block : tiers_[tier].recodable) {
      if (used_[tier] <= Fraction(tiers_[tier].capacity_bytes, limits_.low_watermark) ||
          moves_.size() >= most)
        break;
      if (!MayGoDown(block)) continue;
      moves_.push_back({block.id, static_cast<int>(tier), kRecode});
      used_[tier] -= block.bytes - block.recoded_bytes;
      stay_.insert(block.id);
    }
    return moves_.size() > before;
  }
  void Demote(const BlockView& block, size_t from, size_t to) {
    Add(block, from, to);
    stay_.insert(block.id);
  }

  // The block goes up and at least as many bytes down that were used earlier: the tier above gets no fuller.
  bool Exchange(const BlockView& block, size_t from, size_t target, size_t most) {
    const TierView& above = tiers_[target];
    const size_t below = snapshot_.Below(target);
    if (below >= tiers_.size()) return false;
    std::vector<const BlockView*> down;
    size_t bytes = 0;
    for (const BlockView& candidate : above.coldest) {
      if (bytes >= block.bytes || down.size() == exchanges_[target]) break;
      if (!MayGoDown(candidate) || candidate.idle <= block.idle) continue;
      down.push_back(&candidate);
      bytes += candidate.bytes;
    }
    if (bytes < block.bytes || moves_.size() + down.size() + 1 > most) return false;
    // Up first where there is room for the moment: then there is room below, too.
    const bool up_first =
        used_[target] + block.bytes <= Fraction(above.capacity_bytes, limits_.high_watermark);
    const size_t room = tiers_[below].capacity_bytes + (up_first && below == from ? block.bytes : 0);
    if (used_[below] + bytes > room) return false;
    if (up_first) Add(block, from, target);
    for (const BlockView* const candidate : down) Demote(*candidate, target, below);
    if (!up_first) Add(block, from, target);
    exchanges_[target] -= down.size();
    return true;
  }

  const Snapshot& snapshot_;
  const std::vector<TierView>& tiers_;
  const TierLimits& limits_;
  std::vector<size_t> used_;
  std::vector<size_t> exchanges_;      // by tier: blocks that may still go down for wanted ones
  absl::flat_hash_set<BlockId> stay_;  // wanted, on their way down, or recoded
  absl::flat_hash_set<BlockId> promoted_;
  std::vector<Move> moves_;
};

}  // namespace

std::vector<Move> PickMoves(const Snapshot& snapshot, const TierLimits& limits, size_t max_moves) {
  MovePicker picker(snapshot, limits);
  if (limits.promote_on_attend) picker.Promote(max_moves - max_moves / 2);
  picker.Demote(max_moves);
  if (limits.promote_on_attend) picker.Promote(max_moves);
  return picker.Take();
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
