// The decision is a pure function: every case is a view, rates, and what follows.
#include "daemon/cache/tier/attend_cost.h"

#include "gtest/gtest.h"

namespace kvtide {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr AttendRates kGpu = {5e9, 1e12, 2e10};       // a host processor, a GPU, PCIe
constexpr AttendRates kSlowBus = {2e10, 1e12, 1e10};  // the copy takes twice as long as to attend there once

TEST(AttendCostTest, RulesHaveNames) {
  for (const AttendLowerTiers rule :
       {AttendLowerTiers::kCost, AttendLowerTiers::kInPlace, AttendLowerTiers::kPromoteFirst})
    EXPECT_EQ(*ParseAttendLowerTiers(NameOf(rule)), rule);
  EXPECT_EQ(ParseAttendLowerTiers("first").status().message(),
            "attend_lower_tiers \"first\" is unknown; use cost, in-place or promote-first");
}

TEST(AttendCostTest, TheFasterWayIsTaken) {
  const auto first = [](double reads, double passes, const AttendRates& rates, uint64_t bytes = 64 * kMiB) {
    return PromoteFirst({bytes, 1024 * kMiB, reads, passes}, rates, AttendLowerTiers::kCost);
  };
  EXPECT_TRUE(first(1, 1, kGpu)) << "the copy is faster than one attention there";
  EXPECT_FALSE(first(1, 1, kSlowBus));
  EXPECT_FALSE(first(2, 1, kSlowBus)) << "two attentions there take as long as the copy, and nobody waits";
  EXPECT_TRUE(first(3, 1, kSlowBus)) << "and is worth it when they are read again";
  EXPECT_TRUE(first(1, 4, kSlowBus)) << "many queries read the blocks several times";
  for (const uint64_t bytes : {uint64_t{1}, 1024 * kMiB})
    EXPECT_TRUE(first(1, 1, kGpu, bytes)) << "the rates decide, not the size";
  EXPECT_FALSE(first(8, 100, {1e10, 1e10, 1e12})) << "one memory: nothing is gained at home";
  EXPECT_FALSE(first(8, 100, {2e10, 1e10, 1e12}));
}

TEST(AttendCostTest, NobodyMakesWay) {
  const LowerTierView view = {64 * kMiB, 64 * kMiB - 1, 8, 8};
  for (const AttendLowerTiers rule :
       {AttendLowerTiers::kCost, AttendLowerTiers::kInPlace, AttendLowerTiers::kPromoteFirst})
    EXPECT_FALSE(PromoteFirst(view, kGpu, rule));
}

TEST(AttendCostTest, ARuleMayBeForced) {
  const LowerTierView view = {kMiB, kMiB, 1, 1};
  EXPECT_TRUE(PromoteFirst(view, kSlowBus, AttendLowerTiers::kPromoteFirst));
  EXPECT_FALSE(PromoteFirst(view, kGpu, AttendLowerTiers::kInPlace));
  EXPECT_FALSE(PromoteFirst({0, kMiB, 1, 1}, kGpu, AttendLowerTiers::kPromoteFirst)) << "nothing to bring";
}

TEST(AttendCostTest, ReadsAndPasses) {
  EXPECT_EQ(PassesOf(1), 1);
  EXPECT_EQ(PassesOf(kQueriesOfPass), 1);
  EXPECT_EQ(PassesOf(kQueriesOfPass + 1), 2);
  EXPECT_EQ(ReadsOf(0), 1);
  EXPECT_EQ(ReadsOf(3), 3);
  EXPECT_EQ(ReadsOf(1000), static_cast<double>(kMostReads));
}

}  // namespace
}  // namespace kvtide
