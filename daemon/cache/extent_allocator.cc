#include "daemon/cache/extent_allocator.h"

#include <algorithm>
#include <iterator>

#include "kernels/base/check.h"

namespace kvtide {

ExtentAllocator::ExtentAllocator(size_t capacity_bytes)
    : capacity_bytes_(capacity_bytes / kAlignment * kAlignment), free_bytes_(capacity_bytes_) {
  if (capacity_bytes_ > 0) free_[0] = capacity_bytes_;
}

std::optional<size_t> ExtentAllocator::Allocate(size_t bytes, End end) {
  const size_t need = RoundUp(bytes);
  if (need == 0 || need > free_bytes_) return std::nullopt;
  const auto fits = [need](const auto& extent) { return extent.second >= need; };
  size_t offset = 0;
  if (end == End::kBottom) {
    const auto it = std::find_if(free_.begin(), free_.end(), fits);
    if (it == free_.end()) return std::nullopt;
    offset = it->first;
    const size_t rest = it->second - need;
    free_.erase(it);
    if (rest > 0) free_[offset + need] = rest;
  } else {
    const auto it = std::find_if(free_.rbegin(), free_.rend(), fits);
    if (it == free_.rend()) return std::nullopt;
    const size_t rest = it->second - need;
    offset = it->first + rest;
    if (rest > 0) {
      it->second = rest;
    } else {
      free_.erase(std::next(it).base());
    }
  }
  free_bytes_ -= need;
  return offset;
}

void ExtentAllocator::Free(size_t offset, size_t bytes) {
  const size_t size = RoundUp(bytes);
  KVTIDE_CHECK(size > 0 && offset % kAlignment == 0 && offset + size <= capacity_bytes_, "offset ", offset,
               " bytes ", bytes);
  auto next = free_.lower_bound(offset);
  KVTIDE_CHECK(next == free_.end() || offset + size <= next->first, "freed twice: offset ", offset);
  free_bytes_ += size;
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    KVTIDE_CHECK(before->first + before->second <= offset, "freed twice: offset ", offset);
    if (before->first + before->second == offset) {
      before->second += size;
      if (next != free_.end() && before->first + before->second == next->first) {
        before->second += next->second;
        free_.erase(next);
      }
      return;
    }
  }
  if (next != free_.end() && offset + size == next->first) {
    const size_t merged = size + next->second;
    free_.erase(next);
    free_[offset] = merged;
  } else {
    free_[offset] = size;
  }
}

size_t ExtentAllocator::LargestFreeExtent() const {
  size_t largest = 0;
  for (const auto& [offset, bytes] : free_) largest = std::max(largest, bytes);
  return largest;
}

void ExtentAllocator::CheckInvariants() const {
  size_t sum = 0, end = 0;
  bool first = true;
  for (const auto& [offset, bytes] : free_) {
    KVTIDE_CHECK(bytes > 0 && (first || offset > end), "free extents touch at ", offset);
    end = offset + bytes;
    sum += bytes;
    first = false;
  }
  KVTIDE_CHECK(end <= capacity_bytes_ && sum == free_bytes_, "sum ", sum, " free ", free_bytes_);
}

}  // namespace kvtide
