#include "daemon/cache/read/attend_plans.h"

#include "gtest/gtest.h"

namespace kvtide {
namespace {

std::unique_ptr<CachedAttendPlan> Plan(uint64_t shape, uint64_t content) {
  auto plan = std::make_unique<CachedAttendPlan>();
  plan->key = {{shape}, {content}};
  return plan;
}

TEST(AttendPlansTest, APlanIsOutUntilItIsPutBackAndTheLatestOfAShapeIsReused) {
  AttendPlans plans(8, 0);
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
  AttendPlans plans(2, 0);
  plans.Put(Plan(1, 1));
  plans.Put(Plan(2, 2));
  plans.Put(plans.Take({{1}, {1}}));
  plans.Put(Plan(3, 3));
  EXPECT_EQ(plans.size(), 2u);
  EXPECT_EQ(plans.Take({{2}, {2}}), nullptr);
  EXPECT_NE(plans.Take({{1}, {1}}), nullptr);
}

// Whatever their number, plans keep within the bytes; one that is larger than these alone is not kept.
TEST(AttendPlansTest, KeepsWithinTheBytesOfDevices) {
  struct Tables : AttendPlan {
    explicit Tables(size_t of_device) : bytes(of_device) {}
    size_t device_bytes() const override { return bytes; }
    size_t bytes;
  };
  const auto plan_of = [](uint64_t shape, size_t bytes) {
    auto plan = Plan(shape, 1);
    for (int tier = 0; tier < 2; tier++) {
      plan->parts.emplace_back();
      plan->parts.back().plan = std::make_unique<Tables>(bytes / 2);
    }
    return plan;
  };
  AttendPlans plans(8, 100);
  plans.Put(plan_of(1, 40));
  plans.Put(plan_of(2, 40));
  EXPECT_EQ(plans.bytes(), 80u);
  plans.Put(plan_of(3, 60));
  EXPECT_EQ(plans.bytes(), 100u);
  EXPECT_EQ(plans.Take({{1}, {1}}), nullptr);
  std::unique_ptr<CachedAttendPlan> grown = plans.Take({{2}, {1}});
  EXPECT_EQ(plans.bytes(), 60u) << "who uses it has it";
  static_cast<Tables*>(grown->parts.front().plan.get())->bytes = 1000;
  plans.Put(std::move(grown));
  EXPECT_EQ(plans.size(), 0u);
  EXPECT_EQ(plans.bytes(), 0u);
}

}  // namespace
}  // namespace kvtide
