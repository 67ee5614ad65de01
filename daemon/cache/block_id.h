// Names of blocks.
#pragma once

#include <cstdint>

namespace kvtide {

// Names one block for good: its slot in the store in the lower half, how often that was used in the upper
// one.
using BlockId = uint64_t;
inline uint32_t SlotOf(BlockId id) { return static_cast<uint32_t>(id); }

}  // namespace kvtide
