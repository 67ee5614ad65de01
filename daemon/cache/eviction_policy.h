// An EvictionPolicy orders the recency records that have blocks in one tier from the coldest to the hottest;
// inside a record, blocks go in the order in which they came (recency.h). It decides nothing about room, pins
// or tiers; the tier policy asks it who is next. Not thread-safe; KvCache guards it.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/functional/function_ref.h"

namespace kvtide {

using RecordSlot = uint32_t;  // of a recency record in the block store; small, dense, used again

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  // A record whose first block came into the tier; it is the hottest.
  virtual void Insert(RecordSlot record) = 0;
  virtual void Touch(RecordSlot record) = 0;
  // Shows records from the coldest on until `visit` says false. `visit` must not change the policy.
  virtual void Peek(absl::FunctionRef<bool(RecordSlot)> visit) const = 0;
  virtual void Remove(RecordSlot record) = 0;
};

// Least recently used: all calls take constant time.
std::unique_ptr<EvictionPolicy> MakeLruPolicy();

}  // namespace kvtide
