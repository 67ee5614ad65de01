#include "daemon/service/fair_queue.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

std::string Drain(FairQueue<const char>* queue) {
  std::string order;
  while (const char* work = queue->Pop()) order += *work;
  return order;
}

TEST(FairQueue, CallersTakeTurnsAndKeepTheirOrder) {
  const std::string names = "abcxyz1";
  FairQueue<const char> queue;
  for (int i = 0; i < 3; i++) queue.Push({0, 10}, &names[static_cast<size_t>(i)]);
  for (int i = 3; i < 6; i++) queue.Push({0, 20}, &names[static_cast<size_t>(i)]);
  queue.Push({0, 30}, &names[6]);
  EXPECT_EQ(queue.size(), 7u);
  EXPECT_EQ(Drain(&queue), "ax1bycz");
  EXPECT_EQ(queue.size(), 0u);
  EXPECT_EQ(queue.Pop(), nullptr);
}

// A caller that has just been served waits behind those that were there.
TEST(FairQueue, WhoComesBackStandsAtTheEnd) {
  const std::string names = "ab12";
  FairQueue<const char> queue;
  queue.Push({0, 1}, &names[0]);
  queue.Push({0, 2}, &names[2]);
  queue.Push({0, 2}, &names[3]);
  EXPECT_EQ(*queue.Pop(), 'a');
  queue.Push({0, 1}, &names[1]);
  EXPECT_EQ(Drain(&queue), "1b2");
}

// However much others have waiting, a caller's next piece is served after at most one of each of them.
TEST(FairQueue, NobodyWaitsForMoreThanOneOfEachOther) {
  const char other = 'o', own = '*';
  FairQueue<const char> queue;
  for (uint64_t caller = 1; caller <= 5; caller++) {
    for (int i = 0; i < 100; i++) queue.Push({0, caller}, &other);
  }
  queue.Push({0, 6}, &own);
  for (int i = 0; i < 5; i++) EXPECT_EQ(*queue.Pop(), 'o');
  EXPECT_EQ(*queue.Pop(), '*');
}

// One tenant with ten callers gets as much as another with one.
TEST(FairQueue, TenantsTakeTurnsBeforeTheirCallersDo) {
  const std::string names = "0123456789x";
  FairQueue<const char> queue;
  for (uint64_t caller = 0; caller < 10; caller++)
    for (int i = 0; i < 2; i++) queue.Push({1, caller}, &names[caller]);
  for (int i = 0; i < 3; i++) queue.Push({2, 7}, &names[10]);
  EXPECT_EQ(Drain(&queue), "0x1x2x34567890123456789");
}

// Who has most waiting makes room: among tenants first, then among the callers of one; the newest goes.
TEST(FairQueue, TheGreediestMakesRoom) {
  const std::string names = "abcdefgh";
  FairQueue<const char> queue;
  EXPECT_EQ(queue.TakeFromGreediest({1, 1}), nullptr);
  for (size_t i = 0; i < 4; i++) queue.Push({1, 10}, &names[i]);
  queue.Push({1, 11}, &names[4]);
  EXPECT_EQ(queue.TakeFromGreediest({1, 10}), nullptr) << "it is the greediest itself";
  EXPECT_EQ(*queue.TakeFromGreediest({2, 20}), 'd') << "another tenant's, of its greediest caller the newest";
  EXPECT_EQ(*queue.TakeFromGreediest({1, 12}), 'c') << "another caller's of the same tenant";
  EXPECT_EQ(queue.TakeFromGreediest({1, 11}), nullptr)
      << "has one, the other two: they would only change places";
  queue.Push({2, 20}, &names[5]);
  queue.Push({2, 20}, &names[6]);
  EXPECT_EQ(*queue.TakeFromGreediest({2, 21}), 'g')
      << "tenant 1 has three, tenant 2 two: one of its own makes room";
  EXPECT_EQ(queue.size(), 4u);
  EXPECT_EQ(Drain(&queue), "afeb");
  EXPECT_EQ(queue.size(), 0u);
}

// A tenant of many callers makes room although each has one piece only; who has given it up has no turn left.
TEST(FairQueue, ATenantOfManyCallersMakesRoomToo) {
  const std::string names = "abcdex";
  FairQueue<const char> queue;
  for (uint64_t caller = 0; caller < 5; caller++) queue.Push({1, caller}, &names[caller]);
  EXPECT_EQ(queue.TakeFromGreediest({1, 7}), nullptr);
  const char given = *queue.TakeFromGreediest({2, 7});
  queue.Push({2, 7}, &names[5]);
  EXPECT_EQ(queue.size(), 5u);
  const std::string order = Drain(&queue);
  EXPECT_EQ(order.size(), 5u);
  EXPECT_EQ(order.find(given), std::string::npos);
  EXPECT_EQ(order[1], 'x');
}

}  // namespace
}  // namespace kvtide::service
