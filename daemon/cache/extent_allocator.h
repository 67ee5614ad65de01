// An ExtentAllocator hands out byte ranges of one slab. Long-lived coded blocks are taken from the bottom,
// f16 blocks, which come and go as sequences grow, from the top, so that they do not fragment each other.
// First fit in address order; freed neighbours become one. It never grows: when nothing fits, Allocate says
// so. Not thread-safe; KvCache guards it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

namespace kvtide {

class ExtentAllocator {
 public:
  enum class End : uint8_t { kBottom, kTop };
  static constexpr size_t kAlignment = 128;

  // Capacity is rounded down to the alignment, sizes are rounded up to it.
  explicit ExtentAllocator(size_t capacity_bytes);

  std::optional<size_t> Allocate(size_t bytes, End end);
  // `offset` and `bytes` as allocated; anything else stops the process.
  void Free(size_t offset, size_t bytes);

  size_t capacity_bytes() const { return capacity_bytes_; }
  size_t used_bytes() const { return capacity_bytes_ - free_bytes_; }
  size_t free_bytes() const { return free_bytes_; }
  size_t LargestFreeExtent() const;
  size_t free_extents() const { return free_.size(); }
  void CheckInvariants() const;

 private:
  static size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  size_t capacity_bytes_;
  size_t free_bytes_;
  std::map<size_t, size_t> free_;  // offset -> bytes; no two touch each other
};

}  // namespace kvtide
