// When a sequence was used last, and the blocks that go by it. Recency belongs to sequences, not to blocks,
// so that an attention over a million tokens notes its use in constant time. A sequence has a record of its
// own; forks have one more, the family's, for the blocks that were there before the fork: it counts as used
// when any of them is. BlockStore keeps the records.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/eviction_policy.h"

namespace kvtide {

struct Block;

struct Recency {
  // Its blocks in one tier, in the order in which they came there.
  struct List {
    Block* first = nullptr;
    Block* last = nullptr;
    uint64_t blocks = 0;
  };

  RecordSlot slot = 0;      // in the eviction policies
  std::vector<List> tiers;  // by tier
  uint64_t touch_serial = 0;
  absl::Time last_touched;
  int readers = 0;      // running reads of sequences that have it
  bool pinned = false;  // a sequence that is pinned has it
  bool wanted = false;  // attention found blocks of it below the first tier
  // After a fork the record of the parent goes on in the family's; its blocks have moved there.
  std::shared_ptr<Recency> merged_into;
};
using RecencyPtr = std::shared_ptr<Recency>;

// The records of one sequence.
struct SequenceRecency {
  RecencyPtr own;
  RecencyPtr family;  // null: never forked
};

}  // namespace kvtide
