// All calibrations of a daemon: who is calibrated, with how much memory, and that many threads may bring rows
// while others ask, begin and end.
#include "daemon/calibrate/calibrator.h"

#include <limits>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/daemon/calibrate/traffic_rows.h"

namespace kvtide::testing {
namespace {

using ::testing::HasSubstr;

CalibrationPlan Plan(ModelId family, int64_t tokens = 400, int64_t held_back = 50) {
  CalibrationPlan plan;
  plan.family = family;
  plan.tenant = "acme";
  plan.model = TrafficModel();
  plan.ropes.assign(2, TrafficRope());
  plan.tokens = tokens;
  plan.held_back = held_back;
  plan.share = 1;
  return plan;
}

void Bring(Calibrator& calibrator, ModelId family, const TrafficTokens& tokens) {
  const TrafficRows rows = tokens.Rows();
  for (int layer = 0; layer < 2; layer++)
    if (const int64_t n = calibrator.Wants(family, layer, absl::Milliseconds(1)); n > 0)
      calibrator.See(family, layer, {&rows, 1}, n);
}

CalibrationStatus WaitUntilDone(Calibrator& calibrator, ModelId family) {
  while (true) {
    const CalibrationStatus status = calibrator.StatusOf(family).value();
    if (status.state == CalibrationState::kReady || status.state == CalibrationState::kRefused) return status;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST(CalibratorTest, CalibratesInItsThreadAndIsQuietThen) {
  Calibrator calibrator({});
  EXPECT_FALSE(calibrator.active());
  EXPECT_EQ(calibrator.Wants(1, 0, absl::Seconds(1)), 0);
  EXPECT_EQ(calibrator.StatusOf(1).status().code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(calibrator.Start(Plan(1)).ok());
  EXPECT_TRUE(calibrator.active());
  EXPECT_EQ(calibrator.Wants(2, 0, absl::Seconds(1)), 0);
  Bring(calibrator, 1, TrafficTokens(1, 64, 400));
  const CalibrationStatus status = WaitUntilDone(calibrator, 1);
  EXPECT_EQ(status.state, CalibrationState::kReady) << status.problem;
  EXPECT_TRUE(calibrator.Export(1).ok());
  EXPECT_EQ(calibrator.PlannedRopes(1).value().size(), 2u);
  while (calibrator.active()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_FALSE(status.installed);
  calibrator.NoteInstalled(1);
  EXPECT_TRUE(calibrator.StatusOf(1)->installed);
  EXPECT_EQ(calibrator.Stats().ready, 1);
  // Anew: what was is forgotten, but for its time.
  const absl::Duration spent = calibrator.Stats().spent;
  EXPECT_GT(spent, absl::ZeroDuration());
  ASSERT_TRUE(calibrator.Start(Plan(1)).ok());
  EXPECT_EQ(calibrator.Export(1).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(calibrator.Stats().spent, spent);
  ASSERT_TRUE(calibrator.Stop(1).ok());
  EXPECT_EQ(calibrator.Stop(1).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(calibrator.List().empty());
}

TEST(CalibratorTest, MemoryIsBoundedBeforeItIsTaken) {
  CalibratorOptions options;
  options.memory_bytes = int64_t{40} << 20;
  Calibrator calibrator(options);
  ASSERT_TRUE(calibrator.Start(Plan(1)).ok());
  ASSERT_TRUE(calibrator.Start(Plan(2)).ok());
  const absl::Status third = calibrator.Start(Plan(3));
  EXPECT_EQ(third.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(third.message()), HasSubstr("calibrate_memory"));
  EXPECT_LE(calibrator.Stats().memory_bytes, options.memory_bytes);
  ASSERT_TRUE(calibrator.Start(Plan(2)).ok());  // in place of itself
  calibrator.Forget(1);
  ASSERT_TRUE(calibrator.Start(Plan(3)).ok());
  // The largest model that can be registered.
  CalibrationPlan huge = Plan(4);
  huge.model = UniformModel("huge", {4096, 1024, 512, 512}, 4096);
  huge.ropes.clear();
  huge.tokens = 1 << 24;
  huge.held_back = (1 << 24) - 4096;
  EXPECT_EQ(calibrator.Start(huge).code(), absl::StatusCode::kResourceExhausted);
}

TEST(CalibratorTest, NobodyIsCalibratedWhereTheSettingSaysSo) {
  CalibratorOptions options;
  options.models = CalibratorOptions::Models::kNever;
  Calibrator calibrator(options);
  EXPECT_EQ(calibrator.memory_limit(), 0);
  const absl::Status status = calibrator.Start(Plan(1));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(calibrator.active());
}

TEST(CalibratorTest, ManyThreadsBringRowsWhileOthersAskBeginAndEnd) {
  Calibrator calibrator({});
  ASSERT_TRUE(calibrator.Start(Plan(1, 4000, 500)).ok());
  ASSERT_TRUE(calibrator.Start(Plan(2, 4000, 500)).ok());
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 4; t++)
    threads.emplace_back([&, t] {
      for (uint32_t n = 0; !done; n++)
        for (const ModelId family : {1, 2})
          Bring(calibrator, family, TrafficTokens(100 * t + n % 50, 64, 60));
    });
  threads.emplace_back([&] {
    while (!done) {
      for (const CalibrationStatus& status : calibrator.List()) {
        EXPECT_LE(status.tokens, 4000);
        EXPECT_LE(status.tokens, status.most_tokens);
      }
      calibrator.Stats();
      calibrator.Export(2).IgnoreError();
      std::this_thread::yield();
    }
  });
  for (int n = 0; n < 20; n++) {
    ASSERT_TRUE(calibrator.Start(Plan(2, 4000, 500)).ok());
    calibrator.Stop(2).IgnoreError();
  }
  ASSERT_TRUE(calibrator.Start(Plan(2, 400, 50)).ok());
  for (const ModelId family : {1, 2}) {
    const CalibrationStatus status = WaitUntilDone(calibrator, family);
    EXPECT_EQ(status.state, CalibrationState::kReady) << status.problem;
  }
  done = true;
  for (std::thread& thread : threads) thread.join();
}

TEST(CalibratorTest, AnEndThatComesInTheMiddleOfTheWorkIsQuick) {
  auto calibrator = std::make_unique<Calibrator>(CalibratorOptions());
  ASSERT_TRUE(calibrator->Start(Plan(1, 1 << 20, 1024)).ok());
  for (uint32_t n = 0; n < 20; n++) Bring(*calibrator, 1, TrafficTokens(n, 64, 2000));
  calibrator.reset();
}

}  // namespace
}  // namespace kvtide::testing
