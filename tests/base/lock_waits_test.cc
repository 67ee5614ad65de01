#include "kernels/base/lock_waits.h"

#include <atomic>
#include <limits>
#include <numeric>
#include <thread>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

uint64_t Sum(const LockWaitStats& stats) {
  return std::accumulate(stats.counts.begin(), stats.counts.end(), uint64_t{0});
}

TEST(LockWaits, AFreeMutexCountsNothing) {
  LockWaits waits;
  Mutex mu;
  for (int i = 0; i < 1000; i++) {
    waits.Lock(mu);
    mu.Unlock();
  }
  EXPECT_EQ(Sum(waits.Stats()), 0u);
  EXPECT_EQ(waits.Stats().seconds, 0);
  EXPECT_EQ(LockWaits::TakeOfThisThread(), absl::ZeroDuration());
}

TEST(LockWaits, WhoWaitsIsCountedAndKnowsForHowLong) {
  LockWaits waits;
  Mutex mu;
  absl::Duration told, after;
  // A thread that comes too late finds the mutex free: then again.
  while (Sum(waits.Stats()) == 0) {
    std::atomic<bool> coming{false};
    mu.Lock();
    std::thread other([&] {
      {
        const LockedTime time(&told);
        coming = true;
        waits.Lock(mu);
        mu.Unlock();
      }
      after = LockWaits::TakeOfThisThread();
    });
    while (!coming) std::this_thread::yield();
    for (int i = 0; i < 1000; i++) std::this_thread::yield();
    mu.Unlock();
    other.join();
  }
  const LockWaitStats stats = waits.Stats();
  EXPECT_EQ(Sum(stats), 1u);
  EXPECT_GT(stats.seconds, 0);
  EXPECT_DOUBLE_EQ(absl::ToDoubleSeconds(told), stats.seconds);
  EXPECT_EQ(after, absl::ZeroDuration()) << "it is told once";
  EXPECT_EQ(LockWaits::TakeOfThisThread(), absl::ZeroDuration()) << "this thread has not waited";
  // In the first bucket that it fits into.
  for (size_t i = 0; i < stats.counts.size(); i++) {
    if (stats.counts[i] == 0) continue;
    const double infinity = std::numeric_limits<double>::infinity();
    EXPECT_LE(stats.seconds, i < LockWaitStats::kBounds.size() ? LockWaitStats::kBounds[i] : infinity);
    EXPECT_GT(stats.seconds, i > 0 ? LockWaitStats::kBounds[i - 1] : 0);
  }
}

}  // namespace
}  // namespace kvtide
