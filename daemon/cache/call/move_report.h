// What a call that moves blocks has done.
#pragma once

#include <cstdint>

namespace kvtide {

struct MoveReport {
  uint64_t moved_blocks = 0;
  uint64_t moved_bytes = 0;
  uint64_t dropped_blocks = 0;
  uint64_t degraded_blocks = 0;  // recoded to fewer bits where they lie
  uint64_t left_blocks = 0;      // wanted, but busy (being written or moved) or without room
  uint64_t shared_blocks = 0;    // not demoted, because a sequence that was not named holds them too
  MoveReport& operator+=(const MoveReport& other) {
    moved_blocks += other.moved_blocks;
    moved_bytes += other.moved_bytes;
    dropped_blocks += other.dropped_blocks;
    degraded_blocks += other.degraded_blocks;
    left_blocks += other.left_blocks;
    shared_blocks += other.shared_blocks;
    return *this;
  }
};

}  // namespace kvtide
