#include "daemon/cache/tier/measured_rates.h"

#include "gtest/gtest.h"

namespace kvtide {
namespace {

constexpr double kMiB = 1 << 20;

TEST(RunningRateTest, FollowsWhatIsMeasured) {
  RunningRate rate(1e9);
  EXPECT_DOUBLE_EQ(rate.BytesPerSecond(), 1e9);
  rate.Add(1e6, absl::ZeroDuration());
  EXPECT_DOUBLE_EQ(rate.BytesPerSecond(), 1e9) << "a clock that stands still says nothing";
  rate.Add(1e8, absl::Milliseconds(10));
  EXPECT_NEAR(rate.BytesPerSecond(), 5.5e9, 1e8) << "the start counts as 10 ms of work";
  for (int i = 0; i < 1000; i++) rate.Add(1e8, absl::Milliseconds(10));
  EXPECT_NEAR(rate.BytesPerSecond(), 1e10, 1e7);
  for (int i = 0; i < 300; i++) rate.Add(1e7, absl::Milliseconds(10));
  EXPECT_NEAR(rate.BytesPerSecond(), 1e9, 5e8) << "what is three seconds old is forgotten";
  rate.Add(1e9, absl::Seconds(10));
  EXPECT_NEAR(rate.BytesPerSecond(), 1e8, 1);
}

TEST(MeasuredRatesTest, BeginsByKindOrAsGiven) {
  const MeasuredRates rates({{"cuda:0"}, {"cuda:1"}, {"cpu"}, {""}, {"cpu", 5e8, 7e8}});
  EXPECT_DOUBLE_EQ(rates.attend(0), StartRates::OfAttention("cuda:0"));
  EXPECT_DOUBLE_EQ(rates.attend(2), StartRates::OfAttention("cpu"));
  EXPECT_DOUBLE_EQ(rates.copy_up(2), StartRates::OfCopyUp("cuda:0", "cpu"));
  EXPECT_GT(rates.attend(0), rates.attend(2));
  const AttendRates given = rates.Of(4, 1);
  EXPECT_DOUBLE_EQ(given.lower, 5e8);
  EXPECT_DOUBLE_EQ(given.home, rates.attend(1));
  EXPECT_DOUBLE_EQ(given.up, 7e8);
}

TEST(MeasuredRatesTest, TiersOfOneBackendAreOneMemory) {
  MeasuredRates rates({{"cpu"}, {"cpu"}});
  for (int i = 0; i < 1000; i++) rates.AddAttention(1, 64 * kMiB, absl::Milliseconds(64));
  EXPECT_NEAR(rates.attend(0), 1000 * kMiB, 10 * kMiB);
  EXPECT_DOUBLE_EQ(rates.attend(0), rates.attend(1));
  EXPECT_FALSE(PromoteFirst({1, 1, 8, 1}, rates.Of(1, 0), AttendLowerTiers::kCost));
}

TEST(MeasuredRatesTest, LittleDoesNotCount) {
  MeasuredRates rates({{"cuda:0"}, {"cpu"}});
  rates.AddAttention(0, 1000, absl::Seconds(1));
  rates.AddCopyUp(1, 1000, absl::Seconds(1));
  EXPECT_DOUBLE_EQ(rates.attend(0), StartRates::OfAttention("cuda:0"));
  EXPECT_DOUBLE_EQ(rates.copy_up(1), StartRates::OfCopyUp("cuda:0", "cpu"));
  rates.AddCopyUp(1, 100 * kMiB, absl::Seconds(1));
  EXPECT_NEAR(rates.copy_up(1), 100 * kMiB, 10 * kMiB);
}

}  // namespace
}  // namespace kvtide
