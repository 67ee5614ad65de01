#include "daemon/cache/tier/eviction_policy.h"

#include <algorithm>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "tests/daemon/cache/policy_order.h"

namespace kvtide {
namespace {

using testing::Order;

TEST(LruPolicyTest, ShowsTheColdestFirstAndStopsWhenTold) {
  const std::unique_ptr<EvictionPolicy> policy = MakeLruPolicy();
  for (const RecordSlot id : {4u, 0u, 9u}) policy->Insert(id, Standing::kUsed);
  policy->Touch(4);
  EXPECT_EQ(Order(*policy), (std::vector<RecordSlot>{0, 9, 4}));
  int seen = 0;
  policy->Peek([&](RecordSlot) { return ++seen < 2; });
  EXPECT_EQ(seen, 2);
  policy->Remove(9);
  EXPECT_EQ(Order(*policy), (std::vector<RecordSlot>{0, 4}));
  policy->Insert(9, Standing::kUsed);
  EXPECT_EQ(Order(*policy), (std::vector<RecordSlot>{0, 4, 9}));
}

TEST(LruPolicyTest, RandomCallsAgreeWithAList) {
  std::mt19937 random(5);
  const std::unique_ptr<EvictionPolicy> policy = MakeLruPolicy();
  std::vector<RecordSlot> list;
  for (int step = 0; step < 5000; step++) {
    const RecordSlot id = random() % 40;
    const auto it = std::find(list.begin(), list.end(), id);
    if (it == list.end()) {
      policy->Insert(id, Standing::kUsed);
      list.push_back(id);
    } else {
      list.erase(it);
      if (random() % 2 != 0) {
        policy->Touch(id);
        list.push_back(id);
      } else {
        policy->Remove(id);
      }
    }
    ASSERT_EQ(Order(*policy), list);
  }
}

TEST(LruPolicyDeathTest, UnknownBlocksStopTheProcess) {
  const std::unique_ptr<EvictionPolicy> policy = MakeLruPolicy();
  policy->Insert(1, Standing::kUsed);
  EXPECT_DEATH(policy->Touch(0), "not in the policy");
  EXPECT_DEATH(policy->Insert(1, Standing::kUsed), "inserted twice");
}

}  // namespace
}  // namespace kvtide
