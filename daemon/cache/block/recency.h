// When a sequence was used last, and the blocks that go by it. Recency belongs to sequences, not to blocks,
// so that an attention over a million tokens notes its use in constant time. A sequence has a record of its
// own; forks have one more, the family's, for the blocks that were there before the fork: it counts as used
// when any of them is. BlockStore keeps the records.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/block/slots.h"
#include "daemon/cache/tier/eviction_policy.h"
#include "daemon/cache/tier/priority.h"

namespace kvtide {

struct Recency {
  // Its blocks in one tier, in the order in which they came there.
  struct List {
    uint32_t first = kNoSlot, last = kNoSlot;
    uint64_t blocks = 0;
  };

  RecordSlot slot = 0;  // in the eviction policies
  Standing standing = Standing::kUsed;
  Priority priority = Priority::kNormal;  // of its blocks among the tenant's; changed by the store
  std::vector<List> tiers;                // by tier
  uint64_t touch_serial = 0;
  absl::Time last_touched;
  int readers = 0;      // running reads of sequences that have it
  bool pinned = false;  // a sequence that is pinned has it
  bool wanted = false;  // attention found blocks of it below the first tier
  // So many blocks name it, and keep it by `self` (which is null where there is none).
  uint64_t members = 0;
  std::shared_ptr<Recency> self;
  // After a fork the record of the parent goes on in the family's; its blocks have moved there.
  std::shared_ptr<Recency> merged_into;
};
using RecencyPtr = std::shared_ptr<Recency>;

// The records of one sequence.
struct SequenceRecency {
  RecencyPtr own;
  RecencyPtr family;  // null: never forked
  // Of blocks of a prefix that it has in common with other sequences, or with nobody any more. What goes
  // beyond a few is noted by those others only.
  std::vector<RecencyPtr> prefixes;

  void AddPrefix(const RecencyPtr& record) {
    constexpr size_t kMost = 16;
    if (record == nullptr || record == own || record == family || prefixes.size() >= kMost) return;
    if (std::find(prefixes.begin(), prefixes.end(), record) == prefixes.end()) prefixes.push_back(record);
  }
  template <class F>
  void ForEach(F f) const {
    if (family != nullptr) f(family);
    for (const RecencyPtr& record : prefixes) f(record);
    if (own != nullptr) f(own);
  }
};

}  // namespace kvtide
