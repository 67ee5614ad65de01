#include "daemon/cache/sequence/side_by_side.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <thread>

namespace kvtide {
namespace {

using Parts = std::vector<std::function<void()>>;

TEST(SideBySideTest, RunsAllPartsAtOnceTheFirstOnTheCallersThread) {
  SideBySide side_by_side;
  std::latch all(3);
  std::thread::id first;
  Parts parts(3, [&] { all.arrive_and_wait(); });  // ends only if all three are under way
  parts.front() = [&] {
    first = std::this_thread::get_id();
    all.arrive_and_wait();
  };
  side_by_side.Run(parts);
  EXPECT_EQ(first, std::this_thread::get_id());
}

TEST(SideBySideTest, NeedsNoThreadForOnePart) {
  SideBySide side_by_side;
  int runs = 0;
  side_by_side.Run({});
  side_by_side.Run(Parts{[&] { runs++; }});
  EXPECT_EQ(runs, 1);
  EXPECT_EQ(side_by_side.threads(), 0u);
}

TEST(SideBySideTest, KeepsThreadsForLaterCalls) {
  SideBySide side_by_side;
  std::atomic<int> runs = 0;
  for (int call = 0; call < 200; call++) {
    side_by_side.Run(Parts(3, [&] { runs++; }));
    ASSERT_EQ(runs, 3 * (call + 1));
    ASSERT_EQ(side_by_side.threads(), 2u);
  }
}

TEST(SideBySideTest, CallsDoNotWaitForEachOther) {
  SideBySide side_by_side;
  constexpr int kCalls = 4, kRounds = 50;
  std::latch begun(2 * kCalls);
  std::atomic<int> runs = 0;
  std::vector<std::thread> callers;
  for (int i = 0; i < kCalls; i++)
    callers.emplace_back([&] {
      side_by_side.Run(Parts(2, [&] { begun.arrive_and_wait(); }));  // ends only if all calls are under way
      for (int round = 0; round < kRounds; round++) side_by_side.Run(Parts(2, [&] { runs++; }));
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(runs, 2 * kCalls * kRounds);
  EXPECT_EQ(side_by_side.threads(), static_cast<size_t>(kCalls));
}

}  // namespace
}  // namespace kvtide
