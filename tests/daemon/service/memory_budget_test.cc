#include "daemon/service/memory_budget.h"

#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(MemoryBudget, LimitsACallerAndAllTogether) {
  MemoryBudget budget(100, 60);
  MemoryBudget::Account a, b;
  MemoryBudget::Hold first(&budget, &a), second(&budget, &a), third(&budget, &b);
  EXPECT_TRUE(first.Add(40).ok());
  EXPECT_TRUE(second.Add(20).ok());
  const absl::Status own = second.Add(1);
  EXPECT_EQ(own.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(own.message()),
              AllOf(HasSubstr("61"), HasSubstr("60"), HasSubstr("read the answers")));
  EXPECT_EQ(a.held(), 60);
  EXPECT_TRUE(third.Add(40).ok());
  const absl::Status all = third.Add(1);
  EXPECT_EQ(all.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(all.message()), AllOf(HasSubstr("101"), HasSubstr("call_memory")));
  // What was refused is not held.
  EXPECT_EQ(budget.held(), 100);
  EXPECT_EQ(b.held(), 40);
  first.Drop(30);
  EXPECT_TRUE(third.Add(20).ok());
}

TEST(MemoryBudget, HoldsGiveBackWhatTheyHave) {
  MemoryBudget budget(1 << 20, 1 << 20);
  MemoryBudget::Account account;
  const auto work = [&] {
    for (int i = 0; i < 1000; i++) {
      MemoryBudget::Hold hold(&budget, &account);
      ASSERT_TRUE(hold.Add(100).ok());
      hold.Drop(30);
      ASSERT_TRUE(hold.Add(7).ok());
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; i++) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(budget.held(), 0);
  EXPECT_EQ(account.held(), 0);
}

}  // namespace
}  // namespace kvtide::service
