#include "daemon/service/worker_pool.h"

#include <atomic>
#include <future>

#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

TEST(WorkerPool, SaysNoWhenItsQueueIsFullAndFinishesWhatItTook) {
  std::atomic<int> done{0};
  std::promise<void> busy, release;
  std::shared_future<void> released = release.get_future().share();
  {
    WorkerPool pool(1, 2);
    ASSERT_TRUE(pool.Submit([&busy, released, &done] {
      busy.set_value();
      released.wait();
      done++;
    }));
    busy.get_future().wait();
    EXPECT_TRUE(pool.Submit([&done] { done++; }));
    EXPECT_TRUE(pool.Submit([&done] { done++; }));
    EXPECT_EQ(pool.queued(), 2u);
    EXPECT_FALSE(pool.Submit([&done] { done += 100; }));
    release.set_value();
  }
  EXPECT_EQ(done, 3);
}

TEST(WorkerPool, RunsOnAllItsThreads) {
  std::promise<void> first, second;  // outlive the pool, whose end waits for the work
  WorkerPool pool(2, 16);
  // Each waits for the other: one thread alone would never end.
  ASSERT_TRUE(pool.Submit([&] {
    first.set_value();
    second.get_future().wait();
  }));
  ASSERT_TRUE(pool.Submit([&] {
    first.get_future().wait();
    second.set_value();
  }));
}

}  // namespace
}  // namespace kvtide::service
