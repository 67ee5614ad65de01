// An EvictionPolicy orders the blocks of one tier from the coldest to the hottest. It decides nothing about
// room, pins or tiers; the tier policy asks it who is next. Not thread-safe; KvCache guards it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"

namespace kvtide {

using BlockId = uint32_t;  // slot of a block in the block store; small and dense

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  // A block that came into the tier; it is the hottest.
  virtual void Insert(BlockId block) = 0;
  virtual void Touch(BlockId block) = 0;
  // Shows blocks from the coldest on until `visit` says false. `visit` must not change the policy.
  virtual void Peek(absl::FunctionRef<bool(BlockId)> visit) const = 0;
  virtual void Remove(BlockId block) = 0;
};

// Least recently used: all calls take constant time.
std::unique_ptr<EvictionPolicy> MakeLruPolicy();

}  // namespace kvtide
