// Which blocks move, as pure functions: a snapshot of the tiers in, a list of moves out. The cache performs
// the moves in order; a move that turns out impossible (a block was pinned meanwhile, free room is in pieces)
// is skipped, and the cache asks again.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/tier/block_id.h"

namespace kvtide {

// When blocks move on their own. Fractions are of a tier's capacity.
struct TierLimits {
  double high_watermark = 0.90;  // above it, idle blocks are demoted ...
  double low_watermark = 0.80;   // ... until this is reached
  absl::Duration idle =
      absl::Seconds(5);  // untouched for this long = idle; an append that needs room takes hotter ones too
  bool promote_on_attend = true;
  double promote_below = 0.80;  // promotions on attend fill a tier up to here; Prefetch may fill it wholly
};

// A block that may move: nobody writes, moves or pins it.
struct BlockView {
  BlockId id = 0;
  size_t bytes = 0;
  bool droppable = false;    // all its sequences allow it
  absl::Duration idle;       // since it was last touched
  int home = 0;              // device of the first tier that it is promoted to
  size_t recoded_bytes = 0;  // what it would take recoded to fewer bits; 0: it is not to be
};

struct TierView {
  size_t capacity_bytes = 0;
  size_t used_bytes = 0;
  size_t room_bytes = 0;           // the largest block that fits now, or would if free pieces were gathered
  std::vector<BlockView> coldest;  // coldest first; may be cut off where more would not be needed
  std::vector<BlockView> wanted;   // attention read them here; in the order in which it wanted them
  std::vector<BlockView>
      recodable;  // that may be recoded to fewer bits, in the order in which it is best done
};

struct Snapshot {
  std::vector<TierView> tiers;  // fastest first
  size_t homes = 1;             // so many of them are devices of the first tier, side by side
  absl::Duration cold;  // what was untouched for so long is recoded before anything is demoted (PickRoom)
  size_t Below(size_t tier) const { return tier < homes ? homes : tier + 1; }
  size_t Above(size_t tier, const BlockView& block) const {
    return tier == homes ? static_cast<size_t>(block.home) : tier - 1;
  }
};

constexpr int kDropTier = -1;
constexpr int kRecode = -2;  // as a Move's target: stays in its tier, with fewer bits

struct Move {
  BlockId block = 0;
  int from = 0;
  int to = 0;  // or kDropTier, kRecode
  bool operator==(const Move&) const = default;
};

// What the tiers do on their own. Wanted blocks first: up by one tier each, where the tier above stays below
// promote_below, or where idle blocks there that were used earlier go down in exchange. Then, above the high
// watermark, idle blocks are recoded to fewer bits where they may be, and when none is left to recode go
// down, to the low one, and whatever finds room by that goes up. What is wanted is neither recoded nor goes
// down. Where both have work, each has at least half of max_moves, which is never exceeded, and half of the
// idle blocks of a tier above its watermark. Never drops.
std::vector<Move> PickMoves(const Snapshot& snapshot, const TierLimits& limits, size_t max_moves);

// Moves after which `bytes` should fit into `tier`: recodes cold blocks that may be, then demotes the coldest
// to the next tier below that has room or can make it in the same way. Where no lower tier can take a block,
// what is not cold is recoded as well, and a block is dropped only after that, and if it allows it. Lower
// tiers come first in the list. If there is no way, what can be recoded (once more, the next time), or
// nothing.
std::vector<Move> PickRoom(const Snapshot& snapshot, int tier, size_t bytes);

// The part of it that recodes, until `bytes` should fit or nothing is left to recode: cold blocks, and others
// where there is no tier below.
std::vector<Move> PickRecodes(const Snapshot& snapshot, int tier, size_t bytes);

// A device of the first tier, as a place for a new sequence.
struct HomeView {
  size_t free_bytes = 0, used_bytes = 0;
  size_t sequences = 0;        // that live there
  size_t empty_sequences = 0;  // of these, those without a token so far: they will want room
};

// The device with the most free bytes, when each empty sequence is counted with what the average one takes;
// among equals the one with the fewest sequences, then the first.
int PickHome(const std::vector<HomeView>& homes);

}  // namespace kvtide
