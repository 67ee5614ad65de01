#include "daemon/cache/attend_plans.h"

#include "gtest/gtest.h"

namespace kvtide {
namespace {

std::unique_ptr<CachedAttendPlan> Plan(uint64_t shape, uint64_t content) {
  auto plan = std::make_unique<CachedAttendPlan>();
  plan->key = {{shape}, {content}};
  return plan;
}

TEST(AttendPlansTest, APlanIsOutUntilItIsPutBackAndTheLatestOfAShapeIsReused) {
  AttendPlans plans(8);
  plans.Put(Plan(1, 10));
  plans.Put(Plan(1, 11));
  plans.Put(Plan(2, 10));
  std::unique_ptr<CachedAttendPlan> plan = plans.Take({{1}, {10}});
  ASSERT_NE(plan, nullptr);
  EXPECT_EQ(plans.Take({{1}, {10}}), nullptr) << "one call at a time has it";
  plans.Put(std::move(plan));
  EXPECT_EQ(plans.TakeShape({{1}, {12}})->key.content, std::vector<uint64_t>{10});
  EXPECT_EQ(plans.TakeShape({{1}, {12}})->key.content, std::vector<uint64_t>{11});
  EXPECT_EQ(plans.TakeShape({{1}, {12}}), nullptr);
  EXPECT_EQ(plans.size(), 1u);
}

TEST(AttendPlansTest, TheOneThatWasNotUsedForLongestGoesFirst) {
  AttendPlans plans(2);
  plans.Put(Plan(1, 1));
  plans.Put(Plan(2, 2));
  plans.Put(plans.Take({{1}, {1}}));
  plans.Put(Plan(3, 3));
  EXPECT_EQ(plans.size(), 2u);
  EXPECT_EQ(plans.Take({{2}, {2}}), nullptr);
  EXPECT_NE(plans.Take({{1}, {1}}), nullptr);
}

}  // namespace
}  // namespace kvtide
