// An EvictionPolicy orders the blocks of one tier from the coldest to the hottest. It decides nothing about
// room, pins or tiers; the tier policy asks it who is next. Not thread-safe; KvCache guards it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"

namespace kvtide {

using BlockSlot = uint32_t;  // of a block in the block store; small, dense, used again
// Names one block for good: its slot in the lower half, how often the slot was used in the upper one.
using BlockId = uint64_t;
inline BlockSlot SlotOf(BlockId id) { return static_cast<BlockSlot>(id); }

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  // A block that came into the tier; it is the hottest.
  virtual void Insert(BlockSlot block) = 0;
  virtual void Touch(BlockSlot block) = 0;
  // Shows blocks from the coldest on until `visit` says false. `visit` must not change the policy.
  virtual void Peek(absl::FunctionRef<bool(BlockSlot)> visit) const = 0;
  virtual void Remove(BlockSlot block) = 0;
};

// Least recently used: all calls take constant time.
std::unique_ptr<EvictionPolicy> MakeLruPolicy();

}  // namespace kvtide
