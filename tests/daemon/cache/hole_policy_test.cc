// The planner of holes is a pure function: cases by hand, and random stretches whose plans are carried out on
// a map of bytes.
#include "daemon/cache/tier/hole_policy.h"

#include <algorithm>
#include <map>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using Kind = ExtentView::Kind;

ExtentView Free(size_t bytes) { return {Kind::kFree, bytes, 0, 0}; }
ExtentView Fixed(size_t bytes) { return {Kind::kFixed, bytes, 0, 0}; }
ExtentView Block(BlockId id, size_t bytes, double demotion_cost = 1000) {
  return {Kind::kMovable, bytes, id, demotion_cost};
}

TEST(HolePolicyTest, ClearsTheWindowWithTheLeastInTheWay) {
  const StretchView stretch{100, {Free(8), Block(1, 8), Free(8), Block(2, 4), Free(8), Block(3, 8), Free(8)}};
  const HolePlan plan = *PlanHole(stretch, 20);
  EXPECT_EQ(plan.offset, 116u);
  EXPECT_EQ(plan.bytes, 20u);
  EXPECT_EQ(plan.cost, 4);
  EXPECT_THAT(plan.moves, ElementsAre(HoleMove{2, 100}));
}

TEST(HolePolicyTest, FixedExtentsAreWalls) {
  EXPECT_FALSE(PlanHole({0, {Free(8), Fixed(8), Free(8)}}, 16).has_value());
  const StretchView stretch{0, {Free(8), Fixed(8), Free(8), Block(1, 8), Free(8)}};
  EXPECT_THAT(PlanHole(stretch, 16)->moves, ElementsAre(HoleMove{1, 0}));
  EXPECT_FALSE(PlanHole(stretch, 25).has_value());
}

TEST(HolePolicyTest, DemotesWhatNoExtentTakes) {
  StretchView stretch{0, {Free(6), Block(1, 8), Free(6), Block(2, 8, 7), Free(6)}};
  EXPECT_FALSE(PlanHole(stretch, 20).has_value());
  stretch.room_below = 100;
  EXPECT_FALSE(PlanHole(stretch, 20).has_value()) << "all of it in pieces";
  stretch.largest_below = 8;
  const HolePlan plan = *PlanHole(stretch, 20);
  EXPECT_THAT(plan.moves, ElementsAre(HoleMove{2, std::nullopt})) << "the one whose demotion costs less";
  EXPECT_EQ(plan.cost, 8 + 7);
  stretch.extents[3].demotion_cost = -1;
  EXPECT_THAT(PlanHole(stretch, 20)->moves, ElementsAre(HoleMove{1, std::nullopt}));
}

TEST(HolePolicyTest, WhatFitsAlreadyNeedsNoMove) {
  EXPECT_THAT(PlanHole({0, {Block(1, 8), Free(8)}}, 8)->moves, IsEmpty());
  EXPECT_FALSE(PlanHole({0, {}}, 8).has_value());
  EXPECT_FALSE(PlanHole({0, {Free(7)}}, 8).has_value());
}

// Every second page is free: half of the tier, and no block of two pages fits.
TEST(HolePolicyTest, EverySecondPage) {
  StretchView stretch;
  for (BlockId i = 0; i < 256; i++) {
    stretch.extents.push_back(Free(8));
    stretch.extents.push_back(Block(i, 8));
  }
  const HolePlan plan = *PlanHole(stretch, 1024);
  EXPECT_EQ(plan.moves.size(), 64u) << "of 128 pages";
  for (const HoleMove& move : plan.moves) EXPECT_TRUE(move.to.has_value());
}

TEST(HolePolicyTest, RandomPlansLeaveEveryBlockWholeAndTheHoleFree) {
  std::mt19937 random(3);
  int planned = 0;
  for (int round = 0; round < 5000; round++) {
    StretchView stretch;
    stretch.offset = random() % 100;
    stretch.room_below = random() % 3 == 0 ? random() % 60 : 0;
    stretch.largest_below = stretch.room_below / 2;
    std::map<BlockId, std::pair<size_t, size_t>> blocks;  // offset, bytes
    size_t end = stretch.offset, free = 0;
    const size_t count = 1 + random() % 40;
    for (size_t i = 0; i < count; i++) {
      const size_t bytes = 1 + random() % 16;
      const auto kind = random() % 12 == 0 ? Kind::kFixed : random() % 2 == 0 ? Kind::kFree : Kind::kMovable;
      stretch.extents.push_back(
          {kind, bytes, i, random() % 4 == 0 ? -1.0 : static_cast<double>(random() % 90)});
      if (kind != Kind::kFree) blocks[i] = {end, bytes};
      if (kind == Kind::kFree) free += bytes;
      end += bytes;
    }
    const size_t need = 1 + random() % 48;
    const std::optional<HolePlan> plan = PlanHole(stretch, need);
    if (!plan.has_value()) continue;
    planned++;
    ASSERT_GE(plan->bytes, need);
    size_t below = 0;
    for (const HoleMove& move : plan->moves) {
      ASSERT_EQ(stretch.extents[move.block].kind, Kind::kMovable);
      if (move.to.has_value()) {
        // In the order of the list: what a later block takes is free before anything has moved.
        for (const auto& [id, place] : blocks)
          ASSERT_TRUE(*move.to + blocks[move.block].second <= place.first ||
                      place.first + place.second <= *move.to)
              << "onto block " << id;
        ASSERT_TRUE(*move.to >= stretch.offset && *move.to + blocks[move.block].second <= end);
        blocks[1000 + move.block] = {*move.to, blocks[move.block].second};
      } else {
        ASSERT_GE(stretch.extents[move.block].demotion_cost, 0);
        ASSERT_LE(blocks[move.block].second, stretch.largest_below);
        below += blocks[move.block].second;
      }
    }
    ASSERT_LE(below, stretch.room_below);
    for (const HoleMove& move : plan->moves) blocks.erase(move.block);
    for (const auto& [id, place] : blocks)
      ASSERT_TRUE(plan->offset + plan->bytes <= place.first || place.first + place.second <= plan->offset);
  }
  EXPECT_GT(planned, 1000);
}

}  // namespace
}  // namespace kvtide
