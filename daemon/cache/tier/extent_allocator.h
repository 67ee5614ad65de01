// An ExtentAllocator hands out byte ranges of one slab. Long-lived coded blocks are taken from the bottom,
// f16 blocks, which come and go as sequences grow, from the top, so that they do not fragment each other.
// First fit in address order; freed neighbours become one. It never grows: when nothing fits, Allocate says
// so. Not thread-safe; KvCache guards it.
//
// Free extents lie in a treap by address (Seidel and Aragon, "Randomized Search Trees", 1996) whose nodes
// know the largest extent below them, so every call takes logarithmic time, with a million extents too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/functional/function_ref.h"

namespace kvtide {

class ExtentAllocator {
 public:
  enum class End : uint8_t { kBottom, kTop };
  static constexpr size_t kAlignment = 128;

  // Capacity is rounded down to the alignment, sizes are rounded up to it.
  explicit ExtentAllocator(size_t capacity_bytes);

  std::optional<size_t> Allocate(size_t bytes, End end);
  // These very bytes; false if one of them is taken. `offset` is a multiple of the alignment.
  bool AllocateAt(size_t offset, size_t bytes);
  // `offset` and `bytes` as allocated; anything else stops the process.
  void Free(size_t offset, size_t bytes);

  size_t capacity_bytes() const { return capacity_bytes_; }
  size_t used_bytes() const { return capacity_bytes_ - free_bytes_; }
  size_t free_bytes() const { return free_bytes_; }
  size_t LargestFreeExtent() const { return Largest(root_); }
  size_t free_extents() const { return extents_; }
  // Free extents that begin at `from` or above, in order of address, until `visit` says false.
  void Peek(size_t from, absl::FunctionRef<bool(size_t offset, size_t bytes)> visit) const;
  // Steps of the longest search.
  int Height() const { return Height(root_); }
  void CheckInvariants() const;

  static size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  using Index = uint32_t;  // into nodes_; 0 = none
  struct Node {
    size_t offset = 0, bytes = 0;
    size_t largest = 0;  // of the subtree
    Index left = 0, right = 0;
    uint32_t priority = 0;  // larger ones are nearer to the root
  };

  size_t Largest(Index node) const { return nodes_[node].largest; }
  void Sum(Index node);
  // Extents below `offset`, and the others.
  void Split(Index node, size_t offset, Index* below, Index* above);
  Index Merge(Index below, Index above);
  void Insert(size_t offset, size_t bytes);
  void Erase(size_t offset);
  // The extent with the greatest offset <= `offset`; 0 if there is none.
  Index FindBefore(size_t offset) const;
  Index FindAfter(size_t offset) const;
  // The extent [offset, offset + bytes) gives up [from, from + need).
  void Cut(size_t offset, size_t bytes, size_t from, size_t need);
  int Height(Index node) const;
  bool Peek(Index node, size_t from, absl::FunctionRef<bool(size_t, size_t)> visit) const;

  size_t capacity_bytes_;
  size_t free_bytes_;
  size_t extents_ = 0;
  std::vector<Node> nodes_;  // node 0 is none
  std::vector<Index> unused_;
  Index root_ = 0;
  uint32_t random_ = 0x9e3779b9;
};

}  // namespace kvtide
