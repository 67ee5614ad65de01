#include "daemon/cache/tier/extent_allocator.h"

#include <algorithm>

#include "kernels/base/check.h"

namespace kvtide {

ExtentAllocator::ExtentAllocator(size_t capacity_bytes)
    : capacity_bytes_(capacity_bytes / kAlignment * kAlignment), free_bytes_(capacity_bytes_), nodes_(1) {
  if (capacity_bytes_ > 0) Insert(0, capacity_bytes_);
}

void ExtentAllocator::Sum(Index index) {
  Node& node = nodes_[index];
  node.largest = std::max({node.bytes, Largest(node.left), Largest(node.right)});
}

void ExtentAllocator::Split(Index node, size_t offset, Index* below, Index* above) {
  if (node == 0) {
    *below = *above = 0;
  } else if (nodes_[node].offset < offset) {
    Split(nodes_[node].right, offset, &nodes_[node].right, above);
    *below = node;
    Sum(node);
  } else {
    Split(nodes_[node].left, offset, below, &nodes_[node].left);
    *above = node;
    Sum(node);
  }
}

ExtentAllocator::Index ExtentAllocator::Merge(Index below, Index above) {
  if (below == 0 || above == 0) return below + above;
  if (nodes_[below].priority > nodes_[above].priority) {
    nodes_[below].right = Merge(nodes_[below].right, above);
    Sum(below);
    return below;
  }
  nodes_[above].left = Merge(below, nodes_[above].left);
  Sum(above);
  return above;
}

void ExtentAllocator::Insert(size_t offset, size_t bytes) {
  Index node;
  if (unused_.empty()) {
    node = static_cast<Index>(nodes_.size());
    nodes_.emplace_back();
  } else {
    node = unused_.back();
    unused_.pop_back();
  }
  random_ ^= random_ << 13;
  random_ ^= random_ >> 17;
  random_ ^= random_ << 5;
  nodes_[node] = {offset, bytes, bytes, 0, 0, random_};
  Index below, above;
  Split(root_, offset, &below, &above);
  root_ = Merge(Merge(below, node), above);
  extents_++;
}

void ExtentAllocator::Erase(size_t offset) {
  Index below, node, above;
  Split(root_, offset, &below, &node);
  Split(node, offset + 1, &node, &above);
  KVTIDE_CHECK(node != 0 && nodes_[node].left == 0 && nodes_[node].right == 0);
  unused_.push_back(node);
  root_ = Merge(below, above);
  extents_--;
}

ExtentAllocator::Index ExtentAllocator::FindBefore(size_t offset) const {
  Index found = 0;
  for (Index node = root_; node != 0;) {
    const bool before = nodes_[node].offset <= offset;
    if (before) found = node;
    node = before ? nodes_[node].right : nodes_[node].left;
  }
  return found;
}

ExtentAllocator::Index ExtentAllocator::FindAfter(size_t offset) const {
  Index found = 0;
  for (Index node = root_; node != 0;) {
    const bool after = nodes_[node].offset > offset;
    if (after) found = node;
    node = after ? nodes_[node].left : nodes_[node].right;
  }
  return found;
}

void ExtentAllocator::Cut(size_t offset, size_t bytes, size_t from, size_t need) {
  Erase(offset);
  if (from > offset) Insert(offset, from - offset);
  if (from + need < offset + bytes) Insert(from + need, offset + bytes - from - need);
  free_bytes_ -= need;
}

std::optional<size_t> ExtentAllocator::Allocate(size_t bytes, End end) {
  if (bytes == 0 || bytes > free_bytes_) return std::nullopt;
  const size_t need = RoundUp(bytes);
  if (Largest(root_) < need) return std::nullopt;
  Index node = root_;
  while (true) {
    const Node& here = nodes_[node];
    const Index first = end == End::kBottom ? here.left : here.right;
    if (Largest(first) >= need) {
      node = first;
    } else if (here.bytes >= need) {
      break;
    } else {
      node = end == End::kBottom ? here.right : here.left;
    }
  }
  const size_t offset = nodes_[node].offset, size = nodes_[node].bytes;
  const size_t from = end == End::kBottom ? offset : offset + size - need;
  Cut(offset, size, from, need);
  return from;
}

bool ExtentAllocator::AllocateAt(size_t offset, size_t bytes) {
  KVTIDE_CHECK(offset % kAlignment == 0, "offset ", offset);
  if (bytes == 0 || bytes > capacity_bytes_) return false;
  const size_t need = RoundUp(bytes);
  const Index node = FindBefore(offset);
  if (node == 0 || nodes_[node].offset + nodes_[node].bytes < offset + need) return false;
  Cut(nodes_[node].offset, nodes_[node].bytes, offset, need);
  return true;
}

void ExtentAllocator::Free(size_t offset, size_t bytes) {
  size_t size = RoundUp(bytes);
  KVTIDE_CHECK(size > 0 && offset % kAlignment == 0 && offset + size <= capacity_bytes_, "offset ", offset,
               " bytes ", bytes);
  const Index before = FindBefore(offset), after = FindAfter(offset);
  KVTIDE_CHECK((before == 0 || nodes_[before].offset + nodes_[before].bytes <= offset) &&
                   (after == 0 || offset + size <= nodes_[after].offset),
               "freed twice: offset ", offset);
  free_bytes_ += size;
  if (after != 0 && nodes_[after].offset == offset + size) {
    size += nodes_[after].bytes;
    Erase(nodes_[after].offset);
  }
  if (before != 0 && nodes_[before].offset + nodes_[before].bytes == offset) {
    offset = nodes_[before].offset;
    size += nodes_[before].bytes;
    Erase(offset);
  }
  Insert(offset, size);
}

void ExtentAllocator::Peek(size_t from, absl::FunctionRef<bool(size_t, size_t)> visit) const {
  Peek(root_, from, visit);
}

bool ExtentAllocator::Peek(Index node, size_t from, absl::FunctionRef<bool(size_t, size_t)> visit) const {
  if (node == 0) return true;
  const Node& here = nodes_[node];
  if (here.offset >= from && (!Peek(here.left, from, visit) || !visit(here.offset, here.bytes))) return false;
  return Peek(here.right, from, visit);
}

int ExtentAllocator::Height(Index node) const {
  return node == 0 ? 0 : 1 + std::max(Height(nodes_[node].left), Height(nodes_[node].right));
}

void ExtentAllocator::CheckInvariants() const {
  size_t sum = 0, end = 0, count = 0, largest = 0;
  Peek(0, [&](size_t offset, size_t bytes) {
    KVTIDE_CHECK(bytes > 0 && (count == 0 || offset > end), "free extents touch at ", offset);
    end = offset + bytes;
    sum += bytes;
    largest = std::max(largest, bytes);
    count++;
    return true;
  });
  KVTIDE_CHECK(end <= capacity_bytes_ && sum == free_bytes_ && count == extents_ && largest == Largest(root_),
               "sum ", sum, " free ", free_bytes_, ", ", count, " extents of ", extents_, ", largest ",
               largest);
}

}  // namespace kvtide
