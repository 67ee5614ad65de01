// Names of blocks.
#pragma once

#include <cstdint>
#include <utility>

namespace kvtide {

// What a block is found by, in its namespace: XXH3 of 128 bits over the client's key.
struct BlockKey {
  uint64_t low = 0, high = 0;
  bool operator==(const BlockKey&) const = default;
  template <class H>
  friend H AbslHashValue(H h, const BlockKey& key) {
    return H::combine(std::move(h), key.low, key.high);
  }
};

// Names one block for good: its slot in the store in the lower half, how often that was used in the upper
// one.
using BlockId = uint64_t;
inline uint32_t SlotOf(BlockId id) { return static_cast<uint32_t>(id); }

}  // namespace kvtide
