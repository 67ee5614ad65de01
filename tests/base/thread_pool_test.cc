#include "kernels/base/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

namespace kvtide {
namespace {

TEST(ThreadPool, CallsEveryIterationOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int64_t count : {0, 1, 2, 3, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(count));
      pool.ParallelFor(count, [&](int64_t i) { calls[static_cast<size_t>(i)]++; });
      for (const std::atomic<int>& n : calls) EXPECT_EQ(n.load(), 1);
    }
  }
}

TEST(ThreadPool, ServesSeveralCallersAtOnce) {
  ThreadPool pool(3);
  std::vector<int64_t> sums(4);
  std::vector<std::thread> callers;
  for (size_t c = 0; c < sums.size(); c++)
    callers.emplace_back([&, c] {
      for (int round = 0; round < 50; round++) {
        std::vector<int64_t> values(100);
        pool.ParallelFor(100, [&](int64_t i) { values[static_cast<size_t>(i)] = i; });
        sums[c] += std::accumulate(values.begin(), values.end(), int64_t{0});
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (int64_t sum : sums) EXPECT_EQ(sum, 50 * 4950);
}

}  // namespace
}  // namespace kvtide
