#include "daemon/service/worker_pool.h"

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "daemon/cache/call/refusal.h"
#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

class Piece final : public WorkerPool::Work {
 public:
  explicit Piece(
      std::function<void()> run,
      std::function<void(const absl::Status&)> refuse = [](const absl::Status& why) { FAIL() << why; })
      : run_(std::move(run)), refuse_(std::move(refuse)) {}
  void Run() override { run_(); }
  void Refuse(const absl::Status& why) override { refuse_(why); }

 private:
  const std::function<void()> run_;
  const std::function<void(const absl::Status&)> refuse_;
};

// A pool of one thread that is busy until it is let go.
struct BusyPool {
  explicit BusyPool(size_t max_queued) : pool(1, max_queued) {
    pool.Submit({0, 1}, &work);
    busy.get_future().wait();
  }
  void LetGo() { release.set_value(); }

  std::promise<void> busy, release;
  Piece work{[this] {
    busy.set_value();
    release.get_future().wait();
  }};
  WorkerPool pool;
};

TEST(WorkerPool, SaysNoWhenItsQueueIsFullAndFinishesWhatItTook) {
  std::atomic<int> done{0};
  Piece a([&done] { done++; }), b([&done] { done++; });
  Piece c([&done] { done += 100; },
          [&done](const absl::Status& why) {
            EXPECT_EQ(why.code(), absl::StatusCode::kResourceExhausted);
            EXPECT_EQ(RefusalOf(why), Refusal::kQueueFull);
            done += 10;
          });
  {
    BusyPool busy(2);
    busy.pool.Submit({0, 1}, &a);
    busy.pool.Submit({0, 1}, &b);
    EXPECT_EQ(busy.pool.queued(), 2u);
    busy.pool.Submit({0, 1}, &c);
    EXPECT_EQ(done, 10);
    busy.LetGo();
  }
  EXPECT_EQ(done, 12);
}

// However much one caller sends, the queue has a place for others.
TEST(WorkerPool, OneCallerCannotTakeAllPlaces) {
  int served = 0, refused = 0;
  std::vector<std::unique_ptr<Piece>> many;
  Piece other([&served] { served += 100; }), another([&served] { served += 100; });
  {
    BusyPool busy(8);
    for (int i = 0; i < 100; i++) {
      many.push_back(
          std::make_unique<Piece>([&served] { served++; }, [&refused](const absl::Status&) { refused++; }));
      busy.pool.Submit({1, 1}, many.back().get());
    }
    EXPECT_EQ(refused, 92);
    busy.pool.Submit({2, 5}, &other);
    busy.pool.Submit({1, 6}, &another);
    EXPECT_EQ(refused, 94);
    EXPECT_EQ(busy.pool.queued(), 8u);
    busy.LetGo();
  }
  EXPECT_EQ(served, 206);
}

// One caller has many pieces waiting; another one's piece, that comes last, is the second to be served.
TEST(WorkerPool, CallersTakeTurns) {
  std::string order;
  std::vector<std::unique_ptr<Piece>> many;
  Piece single([&order] { order += 'b'; });
  {
    BusyPool busy(100);
    for (int i = 0; i < 64; i++) {
      many.push_back(std::make_unique<Piece>([&order] { order += 'a'; }));
      busy.pool.Submit({0, 1}, many.back().get());
    }
    busy.pool.Submit({0, 2}, &single);
    busy.LetGo();
  }
  EXPECT_EQ(order, "ab" + std::string(63, 'a'));
}

// Brief calls of other threads pass what waits, as many at a time as the pool has threads.
TEST(WorkerPool, BriefGuestsDoNotWaitForTheQueue) {
  Piece waiting([] {});
  BusyPool busy(2);
  busy.pool.Submit({0, 1}, &waiting);
  EXPECT_FALSE(busy.pool.Enter());
  EXPECT_TRUE(busy.pool.EnterBriefly());
  EXPECT_FALSE(busy.pool.EnterBriefly());
  busy.pool.LeaveBriefly();
  EXPECT_TRUE(busy.pool.EnterBriefly());
  busy.pool.LeaveBriefly();
  busy.LetGo();
}

TEST(WorkerPool, RunsOnAllItsThreads) {
  std::promise<void> first, second;  // outlive the pool, whose end waits for the work
  // Each waits for the other: one thread alone would never end.
  Piece a([&] {
    first.set_value();
    second.get_future().wait();
  });
  Piece b([&] {
    first.get_future().wait();
    second.set_value();
  });
  WorkerPool pool(2, 16);
  pool.Submit({0, 1}, &a);
  pool.Submit({0, 1}, &b);
}

TEST(WorkerPool, WhatWaitsIsRefusedWhenItCloses) {
  int refused = 0;
  const auto never = [] { FAIL() << "ran after the end"; };
  const auto count = [&refused](const absl::Status& why) {
    EXPECT_EQ(why.code(), absl::StatusCode::kUnavailable);
    refused++;
  };
  Piece waiting(never, count), late(never, count);
  BusyPool busy(10);
  busy.pool.Submit({0, 1}, &waiting);
  busy.pool.Close();
  EXPECT_EQ(refused, 1);
  busy.pool.Submit({0, 1}, &late);
  EXPECT_EQ(refused, 2);
  busy.LetGo();
}

}  // namespace
}  // namespace kvtide::service
