#include "kernels/base/second_hand.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace kvtide {
namespace {

using std::chrono::microseconds;
using std::chrono::seconds;

TEST(SecondHand, CallsEveryItemOnce) {
  for (const auto hot : {microseconds(0), microseconds(200), microseconds(seconds(10))}) {
    SecondHand hand(hot);
    for (int round = 0; round < 200; round++)
      for (const size_t count : {size_t{0}, size_t{1}, size_t{2}, size_t{33}}) {
        std::vector<std::atomic<int>> calls(count);
        hand.Share(count, [&](size_t i) { calls[i]++; });
        for (const std::atomic<int>& n : calls) ASSERT_EQ(n.load(), 1);
      }
  }
}

// Whether it sleeps or not, it comes: an item that waits for another thread gets one.
TEST(SecondHand, TakesPart) {
  for (const auto hot : {microseconds(0), microseconds(seconds(10))}) {
    SecondHand hand(hot);
    for (int round = 0; round < 20; round++) {
      std::atomic<int> begun{0};
      std::thread::id threads[2];
      hand.Share(2, [&](size_t i) {
        threads[i] = std::this_thread::get_id();
        begun++;
        while (begun < 2) std::this_thread::yield();
      });
      EXPECT_NE(threads[0], threads[1]);
    }
  }
}

TEST(SecondHand, ServesWhoeverItCan) {
  SecondHand hand(microseconds(50));
  std::vector<std::thread> callers;
  std::vector<int64_t> sums(4);
  for (size_t c = 0; c < sums.size(); c++)
    callers.emplace_back([&, c] {
      for (int round = 0; round < 300; round++) {
        std::atomic<int64_t> sum{0};
        hand.Share(20, [&](size_t i) { sum += static_cast<int64_t>(i); });
        sums[c] += sum;
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (const int64_t sum : sums) EXPECT_EQ(sum, 300 * 190);
}

}  // namespace
}  // namespace kvtide
