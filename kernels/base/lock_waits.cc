#include "kernels/base/lock_waits.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace kvtide {
namespace {

thread_local int64_t waited_nanoseconds = 0;

}  // namespace

void LockWaits::Wait(Mutex& mu) {
  const auto start = std::chrono::steady_clock::now();
  mu.Lock();
  const int64_t nanoseconds =
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
  const auto bucket = std::lower_bound(LockWaitStats::kBounds.begin(), LockWaitStats::kBounds.end(),
                                       static_cast<double>(nanoseconds) * 1e-9) -
                      LockWaitStats::kBounds.begin();
  counts_[static_cast<size_t>(bucket)].fetch_add(1, std::memory_order_relaxed);
  nanoseconds_.fetch_add(nanoseconds, std::memory_order_relaxed);
  waited_nanoseconds += nanoseconds;
}

LockWaitStats LockWaits::Stats() const {
  LockWaitStats stats;
  for (size_t i = 0; i < stats.counts.size(); i++)
    stats.counts[i] = counts_[i].load(std::memory_order_relaxed);
  stats.seconds = static_cast<double>(nanoseconds_.load(std::memory_order_relaxed)) * 1e-9;
  return stats;
}

absl::Duration LockWaits::TakeOfThisThread() {
  return absl::Nanoseconds(std::exchange(waited_nanoseconds, 0));
}

}  // namespace kvtide
