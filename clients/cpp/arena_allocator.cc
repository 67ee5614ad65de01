#include "clients/cpp/arena_allocator.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace kvtide::client {
namespace {

constexpr uint64_t kStep = 64;

}  // namespace

ArenaAllocator::ArenaAllocator(uint64_t bytes) : bytes_(bytes / kStep * kStep), free_bytes_(bytes_) {
  if (bytes_ > 0) free_[0] = bytes_;
}

absl::StatusOr<uint64_t> ArenaAllocator::Allocate(uint64_t bytes) {
  const MutexLock lock(mutex_);
  if (bytes <= bytes_) {
    const uint64_t size = std::max(kStep, (bytes + kStep - 1) / kStep * kStep);
    for (auto piece = free_.begin(); piece != free_.end(); ++piece) {
      if (piece->second < size) continue;
      const auto [offset, room] = *piece;
      free_.erase(piece);
      if (room > size) free_[offset + size] = room - size;
      taken_[offset] = size;
      free_bytes_ -= size;
      return offset;
    }
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      "the arena of ", bytes_, " bytes has no room for ", bytes, " bytes of tensors (", free_bytes_,
      " are free, in ", free_.size(), " pieces); send less at once, or ask for a larger arena"));
}

void ArenaAllocator::Free(uint64_t offset) {
  const MutexLock lock(mutex_);
  const auto found = taken_.find(offset);
  KVTIDE_CHECK(found != taken_.end(), "a piece that the arena did not give, or that was freed before");
  uint64_t size = found->second;
  taken_.erase(found);
  free_bytes_ += size;
  auto after = free_.lower_bound(offset);
  if (after != free_.end() && after->first == offset + size) {
    size += after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      before->second += size;
      return;
    }
  }
  free_[offset] = size;
}

uint64_t ArenaAllocator::free_bytes() const {
  const MutexLock lock(mutex_);
  return free_bytes_;
}

}  // namespace kvtide::client
