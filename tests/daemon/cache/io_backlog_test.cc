// What is wanted waits for no idle block; no block is in a list twice; nothing is left out.
#include "daemon/cache/move/io_backlog.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>

namespace kvtide::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

Move Of(uint64_t block, int from, int to) {
  Move move;
  move.block = block;
  move.from = from;
  move.to = to;
  return move;
}
Move Up(uint64_t block) { return Of(block, 2, 1); }
Move Down(uint64_t block) { return Of(block, 1, 2); }

std::vector<uint64_t> Ids(const std::vector<Move>& moves) {
  std::vector<uint64_t> ids;
  for (const Move& move : moves) ids.push_back(move.block);
  return ids;
}

TEST(IoBacklogTest, WhatIsWantedAndWhatIsIdleTakeTurns) {
  IoBacklog backlog;
  EXPECT_TRUE(backlog.empty());
  EXPECT_THAT(backlog.Next(2), IsEmpty());
  const std::vector<Move> plan = {Down(1), Up(2), Up(3), Down(4), Down(5), Down(6)};
  backlog.Take(plan);
  std::vector<std::vector<uint64_t>> batches;
  while (true) {
    const std::vector<Move> batch = backlog.Next(2);
    if (batch.empty()) break;
    EXPECT_FALSE(backlog.empty());
    batches.push_back(Ids(batch));
    backlog.Done();
  }
  // 1 makes the room of 2 and 3.
  EXPECT_THAT(batches, ElementsAre(ElementsAre(1, 2), ElementsAre(4, 5), ElementsAre(3), ElementsAre(6)));
  EXPECT_TRUE(backlog.empty());
}

TEST(IoBacklogTest, WantedBlocksDoNotWaitForAListOfIdleOnes) {
  IoBacklog backlog;
  std::vector<Move> idle;
  for (uint64_t i = 1; i <= 1000; i++) idle.push_back(Down(i));
  backlog.Take(idle);
  EXPECT_THAT(Ids(backlog.Next(4)), ElementsAre(1, 2, 3, 4));
  const std::vector<Move> wanted = {Up(2000), Down(999)};
  backlog.Take(wanted);  // while a batch runs
  backlog.Done();
  EXPECT_THAT(Ids(backlog.Next(4)), ElementsAre(2000)) << "996 idle ones are left, and 999 is one of them";
  backlog.Done();
  EXPECT_THAT(Ids(backlog.Next(4)), ElementsAre(5, 6, 7, 8));
}

TEST(IoBacklogTest, AListThatIsNotDoneTakesNothing) {
  IoBacklog backlog;
  const std::vector<Move> first = {Up(1)}, second = {Up(2)};
  backlog.Take(first);
  EXPECT_THAT(Ids(backlog.Next(8)), ElementsAre(1));
  backlog.Take(first);  // it moves still: the plan could not know
  backlog.Done();
  EXPECT_THAT(backlog.Next(8), IsEmpty());
  backlog.Take(second);
  EXPECT_THAT(Ids(backlog.Next(8)), ElementsAre(2));
}

TEST(IoBacklogTest, EveryMoveOfAPlanComesOnceAndTheListsKeepTheirOrder) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; round++) {
    IoBacklog backlog;
    std::vector<Move> plan;
    for (uint64_t i = 0; i < random() % 40; i++) plan.push_back(random() % 2 == 0 ? Up(i) : Down(i));
    backlog.Take(plan);
    std::set<uint64_t> seen;
    uint64_t last_up = 0;
    for (std::vector<Move> batch; !(batch = backlog.Next(1 + random() % 7)).empty(); backlog.Done()) {
      for (const Move& move : batch) {
        EXPECT_TRUE(seen.insert(move.block).second);
        if (move.to > move.from) continue;
        EXPECT_GE(move.block, last_up);
        last_up = move.block;
      }
    }
    EXPECT_EQ(seen.size(), plan.size());
    EXPECT_TRUE(backlog.empty());
  }
}

}  // namespace
}  // namespace kvtide::testing
