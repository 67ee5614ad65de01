// One calibration from traffic: its sums are those of the rows that came, its guard refuses a profile that
// does not fit what came last, and it takes no more time and memory than it may.
#include "daemon/calibrate/gathering.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/float16.h"
#include "tests/daemon/calibrate/traffic_rows.h"

namespace kvtide::testing {
namespace {

using ::testing::HasSubstr;

const std::atomic<bool> kGo{false};

CalibrationPlan Plan(int64_t tokens, int64_t held_back, double share = 1) {
  CalibrationPlan plan;
  plan.family = 1;
  plan.tenant = "acme";
  plan.model = TrafficModel();
  plan.ropes.assign(2, TrafficRope());
  plan.tokens = tokens;
  plan.held_back = held_back;
  plan.share = share;
  const absl::Status status = CompletePlan(&plan);
  EXPECT_TRUE(status.ok()) << status;
  return plan;
}

uint64_t HashOf(const ModelSpec& model) {
  const LayerGroupSpec& group = model.groups[0];
  return MakeCalibratedProfile(group.shape, group.key_means, group.key_transforms).value().hash;
}

void SeeAll(Gathering& gathering, const TrafficTokens& tokens) {
  const TrafficRows rows = tokens.Rows();
  for (int layer = 0; layer < 2; layer++) {
    if (gathering.Wants(layer, absl::Milliseconds(1)) > 0)
      gathering.See(layer, {&rows, 1}, std::numeric_limits<int64_t>::max());
    gathering.Work(kGo);
  }
}

TEST(GatheringTest, TheProfileIsThatOfTheSameRows) {
  for (const bool after_rope : {false, true}) {
    CalibrationPlan plan = Plan(500, 100);
    plan.after_rope = after_rope;
    Gathering gathering(plan);
    EXPECT_THAT(std::string(gathering.Export().status().message()), HasSubstr("0 of 500 tokens"));
    ThreadPool pool(2);
    const std::vector<Rope> ropes(after_rope ? 0 : 2, TrafficRope());
    KeySums sums(TrafficModel().groups[0].shape, 4, ropes, &pool);
    // Two sequences whose first blocks do not count; the last rows are held back, and what comes after them
    // is not taken.
    const TrafficTokens first(1, 0, 364), second(2, 40, 324);
    for (const TrafficTokens* const tokens : {&first, &second}) SeeAll(gathering, *tokens);
    for (int layer = 0; layer < 2; layer++) {
      sums.AddKeys(layer, 64, 300, first.k.data() + 64 * 64);
      sums.AddQueries(layer, 64, 300, first.q.data() + 64 * 128);
      sums.AddKeys(layer, 64, 100, second.k.data() + 24 * 64);
      sums.AddQueries(layer, 64, 100, second.q.data() + 24 * 128);
      sums.HoldBackKeys(layer, 164, 100, second.k.data() + 124 * 64);
      sums.HoldBackQueries(layer, 164, 100, second.q.data() + 124 * 128);
    }
    const CalibrationStatus status = gathering.Status();
    ASSERT_EQ(status.state, CalibrationState::kReady) << status.problem;
    const absl::StatusOr<ModelSpec> model = gathering.Export();
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_TRUE(CheckModelSpec(*model).ok());
    const Profile expected = sums.MakeProfile().value();
    EXPECT_EQ(HashOf(*model), expected.hash);
    EXPECT_EQ(expected.keys_turned_back(), !after_rope);
    EXPECT_EQ(status.tokens, 500);
    EXPECT_EQ(status.whole_layers, 2);
    EXPECT_EQ(status.query_rows, 2 * 500 * 4);
    EXPECT_EQ(status.left_out_rows, 0);
    EXPECT_EQ(status.waiting_tokens, 0);
    EXPECT_EQ(status.context, 364);
    std::vector<KeyTypeError> errors;
    ASSERT_TRUE(CompareKeyTypes(sums.Measure(expected).value(), &errors).ok());
    ASSERT_EQ(status.errors.size(), 4u);
    for (size_t i = 0; i < 3; i++) {
      EXPECT_EQ(status.errors[i].type, errors[i].type);
      EXPECT_EQ(status.errors[i].error, errors[i].error);
      EXPECT_EQ(status.errors[i].beside_error, errors[i].beside_error);
    }
  }
}

TEST(GatheringTest, RowsOfAnyTypeAndKeysApartFromQueriesAreTheSame) {
  const TrafficTokens tokens(3, 64, 400);
  std::vector<uint16_t> k(tokens.k.size()), q(tokens.q.size());
  TrafficTokens rounded = tokens;
  for (size_t i = 0; i < k.size(); i++) rounded.k[i] = F16ToF32(k[i] = F32ToF16(tokens.k[i]));
  for (size_t i = 0; i < q.size(); i++) rounded.q[i] = F16ToF32(q[i] = F32ToF16(tokens.q[i]));
  Gathering whole(Plan(400, 50)), apart(Plan(400, 50));
  SeeAll(whole, rounded);
  const TrafficRows rows[] = {{64, 400, {k.data(), DataType::kF16}, 0, 0, {}},
                              {0, 0, {}, 64, 400, {q.data(), DataType::kF16}}};
  for (int layer = 0; layer < 2; layer++)
    for (const TrafficRows& one : rows) {
      ASSERT_GT(apart.Wants(layer, absl::Milliseconds(1)), 0);
      EXPECT_TRUE(apart.See(layer, {&one, 1}, 1 << 20));
      apart.Work(kGo);
    }
  ASSERT_EQ(whole.Status().state, CalibrationState::kReady) << whole.Status().problem;
  ASSERT_EQ(apart.Status().state, CalibrationState::kReady) << apart.Status().problem;
  EXPECT_EQ(HashOf(*whole.Export()), HashOf(*apart.Export()));
}

TEST(GatheringTest, AProfileThatDoesNotFitWhatCameLastIsRefused) {
  Gathering gathering(Plan(500, 100));
  SeeAll(gathering, TrafficTokens(1, 64, 400, 1));
  SeeAll(gathering, TrafficTokens(2, 64, 100, 5));  // other channels are strong
  const CalibrationStatus status = gathering.Status();
  ASSERT_EQ(status.state, CalibrationState::kRefused);
  EXPECT_THAT(status.problem, HasSubstr("tide"));
  EXPECT_THAT(status.problem, HasSubstr("differ"));
  ASSERT_EQ(status.errors.size(), 4u);
  EXPECT_TRUE(std::any_of(status.errors.begin(), status.errors.end(),
                          [](const KeyTypeError& e) { return e.error >= e.beside_error; }));
  const absl::Status refused = gathering.Export().status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("was refused"));
}

TEST(GatheringTest, ValuesThatNoProfileCanHaveAreRefusedAndNothingElseHappens) {
  for (const float value : {std::numeric_limits<float>::infinity(), 3e38f, 0.0f}) {
    Gathering gathering(Plan(300, 50));
    TrafficTokens tokens(1, 64, 300);
    std::fill(tokens.q.begin(), tokens.q.end(), value);
    SeeAll(gathering, tokens);
    EXPECT_EQ(gathering.Status().state, CalibrationState::kRefused) << value;
    EXPECT_FALSE(gathering.Status().problem.empty());
  }
}

// The account: a share of the time of calls, no more.
TEST(GatheringTest, SamplesOnlyWhatAShareOfTheTimeOfCallsPays) {
  Gathering gathering(Plan(16384, 1024, 0.01));
  EXPECT_EQ(gathering.Wants(0, absl::Milliseconds(1)), 0);  // 10 us are there from now on
  const int64_t few = gathering.Wants(0, absl::Milliseconds(1));
  EXPECT_GE(few, 1);
  EXPECT_LE(few, 7);  // a token takes 1.5 us until it was measured
  // A short call is not made longer by many rows, however much was saved up.
  for (int i = 0; i < 100; i++) gathering.Wants(0, absl::Milliseconds(1));
  EXPECT_EQ(gathering.Wants(0, absl::Microseconds(10)), 1);
  // What a pause has saved up is spent in pieces.
  EXPECT_LE(gathering.Wants(0, absl::Hours(1)), 256);
  EXPECT_LE(gathering.Wants(0, absl::Hours(1)), 256);
  EXPECT_EQ(gathering.Status().observed,
            2 * absl::Hours(1) + absl::Milliseconds(102) + absl::Microseconds(10));
}

TEST(GatheringTest, TheSampleIsSpreadOverTheCallAndNoLayerRunsAhead) {
  Gathering gathering(Plan(16384, 1024, 0.5));
  const TrafficTokens tokens(1, 1000, 512);
  const TrafficRows rows = tokens.Rows();
  for (int i = 0; i < 1000; i++) {
    if (const int64_t n = gathering.Wants(0, absl::Seconds(1)); n > 0) gathering.See(0, {&rows, 1}, n);
    gathering.Work(kGo);
  }
  const CalibrationStatus status = gathering.Status();
  EXPECT_GT(status.most_tokens, 0);
  EXPECT_LE(status.most_tokens, 512);  // layer 1 has none
  EXPECT_EQ(status.tokens, 0);
  EXPECT_EQ(status.whole_layers, 0);
  EXPECT_GT(status.context, 1400);  // a token of the last quarter was among them
  EXPECT_EQ(status.state, CalibrationState::kGathering);
  EXPECT_GT(status.spent, absl::ZeroDuration());
}

TEST(GatheringTest, WhatWaitsIsBoundedAndWhatIsLeftOutIsTold) {
  Gathering gathering(Plan(int64_t{1} << 24, 1024));
  const TrafficTokens tokens(1, 64, 4096);
  const TrafficRows rows = tokens.Rows();
  int taken = 0;
  while (gathering.See(0, {&rows, 1}, 1 << 20)) taken++;
  const int64_t bytes = int64_t{4096} * 6 * 32 * 4;
  EXPECT_EQ(taken, (16 << 20) / bytes);
  EXPECT_EQ(gathering.Status().left_out_rows, 4096 * 2 + 4096 * 4);
  EXPECT_EQ(gathering.Status().waiting_tokens, int64_t{4096} * taken);
  EXPECT_TRUE(gathering.Work(kGo));
  EXPECT_EQ(gathering.Status().waiting_tokens, 0);
  EXPECT_EQ(gathering.Status().most_tokens, int64_t{4096} * taken);
  EXPECT_FALSE(gathering.Work(kGo));
  // A call that is larger than all that may wait is sampled.
  Gathering other(Plan(int64_t{1} << 24, 1024));
  const TrafficTokens large(2, 64, 30000);
  const TrafficRows many = large.Rows();
  EXPECT_TRUE(other.See(0, {&many, 1}, 1 << 20));
  EXPECT_GT(other.Status().waiting_tokens, 4096);
  EXPECT_LE(other.Status().waiting_tokens * 6 * 32 * 4, 4 << 20);
}

TEST(GatheringTest, PlansSayWhatIsWrong) {
  const auto refused = [](const char* what, auto change) {
    CalibrationPlan plan;
    plan.model = TrafficModel();
    change(plan);
    const absl::Status status = CompletePlan(&plan);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(what));
  };
  refused("tokens is -1", [](CalibrationPlan& p) { p.tokens = -1; });
  refused("tokens is 16777217", [](CalibrationPlan& p) { p.tokens = (1 << 24) + 1; });
  refused("held_back_tokens is 16384", [](CalibrationPlan& p) { p.held_back = 16384; });
  refused("held_back_tokens is -3", [](CalibrationPlan& p) { p.held_back = -3; });
  refused("want at least 128", [](CalibrationPlan& p) { p.tokens = 140; });
  refused("share is 1.5", [](CalibrationPlan& p) { p.share = 1.5; });
  refused("share is nan", [](CalibrationPlan& p) { p.share = std::nan(""); });
  refused("RoPE of 3 layers", [](CalibrationPlan& p) { p.ropes.resize(3); });
  refused("RoPE of layer 1", [](CalibrationPlan& p) { p.ropes = {Rope(), TrafficRope()}; });
  // Not known, or none at all: keys as they are stored.
  for (const size_t layers : {0, 2}) {
    CalibrationPlan plan;
    plan.model = TrafficModel();
    plan.ropes.resize(layers);
    ASSERT_TRUE(CompletePlan(&plan).ok());
    EXPECT_TRUE(plan.after_rope);
    EXPECT_EQ(plan.held_back, 1024);
  }
}

}  // namespace
}  // namespace kvtide::testing
