// The fleet simulation: deterministic, monotone where it must be, and honest about host tiers.
#include "planner/fleet/fleet.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "planner/model/catalogue.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

FleetRequest Request() {
  FleetRequest request;
  request.plan.model = *FindModel("llama-3.1-8b");
  request.plan.device = *ParseDevice("RTX 4090");
  request.plan.engine.engine = Engine::kKvtide;
  request.plan.weights = {5 * kGiB, Provenance::kExact, "test"};
  request.pair = {"q8_0", "turbo4"};
  request.mix = {{"chat", 8192, 300, 10, 60, 0.4}};
  request.duration_s = 1200;
  request.prefill_tokens_per_s = 100000;  // memory is what is short
  return request;
}

FleetResult Simulate(const FleetRequest& request) {
  const auto result = SimulateFleet(request);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? *result : FleetResult{};
}

TEST(Fleet, IsDeterministic) {
  const FleetRequest request = Request();
  EXPECT_EQ(RenderFleetJson(request, Simulate(request)), RenderFleetJson(request, Simulate(request)));
}

TEST(Fleet, SharesSumToOneAndHostTiersHelp) {
  const FleetRequest request = Request();
  const FleetResult result = Simulate(request);
  ASSERT_EQ(result.points.size(), 6u);
  for (const FleetPoint& point : result.points) {
    EXPECT_GT(point.turns, 100);
    EXPECT_NEAR(point.device_hit + point.host_hit + point.miss, 1, 1e-9);
    EXPECT_GE(point.miss, 0);
  }
  EXPECT_EQ(result.points[0].host_hit, 0);
  for (size_t i = 1; i < result.points.size(); ++i) {
    EXPECT_LE(result.points[i].miss, result.points[i - 1].miss + 0.02)
        << i;  // more host memory never hurts (but for noise)
  }
  EXPECT_LT(result.points.back().miss, result.points.front().miss);
}

TEST(Fleet, SmallWriteThroughTierGainsNothingAndIsWarnedAbout) {
  FleetRequest request = Request();
  request.mode = HostTierMode::kInclusive;
  const FleetResult result = Simulate(request);
  const double device = static_cast<double>(result.device_tier_bytes);
  for (const FleetPoint& point : result.points) {
    if (static_cast<double>(point.host_bytes) < 0.6 * device) {
      EXPECT_LT(point.host_hit, 0.005) << point.host_bytes;
    }
  }
  EXPECT_GT(result.points.back().host_hit, 0.05);  // four times the device tier
  EXPECT_THAT(result.warnings, ::testing::Contains(HasSubstr("gains nothing")));
}

TEST(Fleet, MoreLoadNeedsMoreGpus) {
  FleetRequest request = Request();
  request.host_bytes = {0};
  const int few = Simulate(request).points[0].gpus;
  EXPECT_EQ(Simulate(request).best, 0);
  request.mix[0].rate_per_s *= 8;
  const int many = Simulate(request).points[0].gpus;
  EXPECT_GE(few, 1);
  EXPECT_GT(many, few);
  request.max_gpus = 1;
  EXPECT_EQ(Simulate(request).points[0].gpus, 0);
  EXPECT_EQ(Simulate(request).best, -1);
  EXPECT_THAT(RenderFleetTable(request, Simulate(request)), HasSubstr("do not suffice"));
}

TEST(Fleet, PrefillIsSharedByTheTurnsOfAGpu) {
  // Sessions of 32K tokens that come back to nothing ask for more prompt tokens than a few GPUs have.
  FleetRequest request = Request();
  request.mix = {{"agent", 32768, 300, 20, 60, 1.0}};
  request.prefill_tokens_per_s = 5000;
  request.host_bytes = {0};
  request.max_gpus = 3;
  const FleetResult small = Simulate(request);
  const FleetPoint& point = small.points[0];
  EXPECT_LE(point.recomputed_tokens_per_s, 1.02 * 3 * request.prefill_tokens_per_s);
  EXPECT_GT(point.wait_p95_s, request.max_wait_s);
  EXPECT_GT(point.held, 0.8) << "turns wait because others hold the cache";
  EXPECT_EQ(point.gpus, 0);
  EXPECT_THAT(small.warnings, ::testing::Contains(HasSubstr("prefill takes")));
  request.max_gpus = 256;
  const FleetResult enough = Simulate(request);
  ASSERT_GT(enough.points[0].gpus, 3);
  EXPECT_LE(enough.points[0].prefill_load, 1);
  EXPECT_LT(enough.points[0].held, point.held);
  EXPECT_LE(enough.points[0].wait_p95_s, request.max_wait_s);
}

TEST(Fleet, GroupsAreCountedInCards) {
  FleetRequest request = Request();
  request.plan.device.count = 2;
  request.host_bytes = {0};
  const FleetResult result = Simulate(request);
  EXPECT_EQ(result.cards_per_group, 2);
  EXPECT_EQ(result.points[0].gpus, 2 * result.points[0].groups);
  EXPECT_THAT(RenderFleetTable(request, result), HasSubstr("1 group of 2"));
}

TEST(Fleet, SingleTurnsCannotProfit) {
  FleetRequest request = Request();
  request.mix[0].turns = 1;
  EXPECT_THAT(Simulate(request).warnings, ::testing::Contains(HasSubstr("nothing ever comes back")));
}

TEST(Fleet, BadInputIsExplained) {
  FleetRequest request = Request();
  request.mix[0].rate_per_s = 0;
  EXPECT_THAT(std::string(SimulateFleet(request).status().message()), HasSubstr("rate_per_s"));
  request = Request();
  request.mix[0].rate_per_s = 1e9;
  EXPECT_THAT(std::string(SimulateFleet(request).status().message()), HasSubstr("--duration"));
  request = Request();
  request.plan.device = *ParseDevice("vram=7GiB,bandwidth=448GB/s");
  request.mix[0].context_tokens = 131072;
  EXPECT_TRUE(absl::IsFailedPrecondition(SimulateFleet(request).status()));
  EXPECT_THAT(std::string(ParseMixCsv("context_tokens\n1\n", "mix.csv").status().message()),
              HasSubstr("rate_per_s"));
  const auto mix = ParseMixCsv("context_tokens,rate_per_s\n4096,0.5\n", "mix.csv");
  ASSERT_TRUE(mix.ok());
  EXPECT_EQ((*mix)[0].turns, 1);
  EXPECT_EQ((*mix)[0].output_tokens, 256);
}

}  // namespace
}  // namespace kvtide::planner
