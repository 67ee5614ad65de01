#include "kernels/cuda/device/pinned_ranges.h"

#include <algorithm>
#include <cstdint>
#include <functional>

#include "kernels/base/mutex.h"

namespace kvtide::cuda {
namespace {

constexpr uintptr_t kVector = 16;

Mutex mutex;
std::shared_ptr<const PinnedRanges>& Current() {
  static auto* const current = new std::shared_ptr<const PinnedRanges>(std::make_shared<PinnedRanges>());
  return *current;
}

}  // namespace

std::shared_ptr<const PinnedRanges> PinnedRanges::Now() {
  const MutexLock lock(mutex);
  return Current();
}

void PinnedRanges::Add(const std::byte* data, size_t bytes) {
  const MutexLock lock(mutex);
  auto next = std::make_shared<PinnedRanges>(*Current());
  const auto behind = std::find_if(next->ranges_.begin(), next->ranges_.end(),
                                   [&](const Range& range) { return std::less<>()(data, range.begin); });
  next->ranges_.insert(behind, {data, data + bytes});
  Current() = std::move(next);
}

void PinnedRanges::Remove(const std::byte* data) {
  const MutexLock lock(mutex);
  auto next = std::make_shared<PinnedRanges>(*Current());
  std::erase_if(next->ranges_, [&](const Range& range) { return range.begin == data; });
  Current() = std::move(next);
}

bool PinnedRanges::Reaches(const void* data, size_t bytes) const {
  const auto* const begin = static_cast<const std::byte*>(data);
  if ((reinterpret_cast<uintptr_t>(begin) | bytes) % kVector != 0) return false;
  return std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
    return !std::less<>()(begin, range.begin) && !std::less<>()(range.end, begin) &&
           bytes <= static_cast<size_t>(range.end - begin);
  });
}

}  // namespace kvtide::cuda
