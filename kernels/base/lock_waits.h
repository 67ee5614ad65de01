// How long calls wait for the cache's mutex. One that is free is taken by trying, which costs no clock; only
// who has to wait looks at it. Lock-free, and exact: a wait is counted by who has waited.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"
#include "kernels/base/mutex.h"

namespace kvtide {

// Of one cache since it was made.
struct LockWaitStats {
  // Bounds of the buckets in seconds; a last bucket holds what is longer.
  static constexpr std::array<double, 9> kBounds = {1e-6,   5e-6,  25e-6,  100e-6, 500e-6,
                                                    2.5e-3, 10e-3, 100e-3, 1};
  std::array<uint64_t, kBounds.size() + 1> counts{};
  double seconds = 0;  // all waits together
};

class LockWaits {
 public:
  void Lock(Mutex& mu) ABSL_EXCLUSIVE_LOCK_FUNCTION(mu) {
    if (!mu.TryLock()) Wait(mu);
  }
  LockWaitStats Stats() const;

  // What the calling thread has waited for, in any cache, since it last asked.
  static absl::Duration TakeOfThisThread();

 private:
  void Wait(Mutex& mu) ABSL_EXCLUSIVE_LOCK_FUNCTION(mu);

  std::array<std::atomic<uint64_t>, LockWaitStats::kBounds.size() + 1> counts_{};
  std::atomic<int64_t> nanoseconds_{0};
};

// Says how long the thread that makes it has waited for mutexes of caches until it goes.
class LockedTime {
 public:
  explicit LockedTime(absl::Duration* locked) : locked_(locked) { LockWaits::TakeOfThisThread(); }
  ~LockedTime() { *locked_ = LockWaits::TakeOfThisThread(); }
  LockedTime(const LockedTime&) = delete;
  LockedTime& operator=(const LockedTime&) = delete;

 private:
  absl::Duration* const locked_;
};

}  // namespace kvtide
