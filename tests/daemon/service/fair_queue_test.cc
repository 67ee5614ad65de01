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

}  // namespace
}  // namespace kvtide::service
