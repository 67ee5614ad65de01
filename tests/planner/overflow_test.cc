// No size wraps around: whatever is asked within the limits, no number is negative and more never needs less.
#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "planner/model/catalogue.h"
#include "planner/plan/plan.h"
#include "planner/plan/plan_request.h"
#include "planner/saturating.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

TEST(Saturating, StaysAtTheLargestNumber) {
  EXPECT_EQ(Product(3, 5, 7), 105);
  EXPECT_EQ(Product(int64_t{1} << 40, int64_t{1} << 40), kMost);
  EXPECT_EQ(Product(kMost, 2, 0), 0);
  EXPECT_EQ(Sum(kMost, 1), kMost);
  EXPECT_EQ(Sum(kMost, -1), kMost - 1);
  EXPECT_EQ(Sum(), 0);
}

PlanRequest Huge(Engine engine) {
  PlanRequest request;
  request.model.name = "huge";
  request.model.layers.assign(80, {LayerKind::kFull, 8, 128, 128});
  request.device = *ParseDevice("vram=80GiB,bandwidth=3350");
  request.engine.engine = engine;
  request.weights = {1, Provenance::kExact, "test"};
  request.quality = BuiltInQuality();
  return request;
}

TEST(Overflow, TwoToThe25TokensTimesTwoToThe20SequencesDoNotFit) {
  for (const Engine engine : {Engine::kLlamaCpp, Engine::kVllm, Engine::kKvtide}) {
    PlanRequest request = Huge(engine);
    request.workload.contexts = {1 << 25};
    request.workload.concurrency = 1 << 20;
    const auto plan = MakePlan(request);
    ASSERT_TRUE(plan.ok()) << plan.status();
    const ContextPlan& context = plan->contexts[0];
    EXPECT_EQ(context.verdict, Verdict::kDoesNotFit) << EngineName(engine);
    for (const Candidate& candidate : context.candidates) {
      EXPECT_FALSE(candidate.fits) << candidate.asked.Name();
      EXPECT_GT(candidate.kv_bytes, 0) << candidate.asked.Name();
      EXPECT_GT(candidate.total_bytes, 0) << candidate.asked.Name();
      EXPECT_LT(candidate.free_bytes, 0) << candidate.asked.Name();
    }
  }
}

// Random loads and shapes up to the limits of requests.
TEST(Overflow, NoNumberIsNegativeAndMoreNeverNeedsLess) {
  std::mt19937_64 random(1);
  const auto power = [&](int most) { return int64_t{1} << (random() % static_cast<uint64_t>(most + 1)); };
  for (int round = 0; round < 400; ++round) {
    PlanRequest request = Huge(static_cast<Engine>(round % 3));
    LayerGeometry layer{LayerKind::kFull, static_cast<int>(power(12)), 128, 128};
    if (round % 5 == 1)
      layer = {LayerKind::kSliding, static_cast<int>(power(12)), 128, 128, static_cast<int>(power(30))};
    if (round % 5 == 2) {
      layer = {LayerKind::kRecurrent};
      layer.state_bytes = power(40);
    }
    if (round % 5 == 3 && request.engine.engine != Engine::kKvtide) layer = {LayerKind::kMla, 1, 576, 0};
    request.model.layers.assign(static_cast<size_t>(power(12)), layer);
    request.model.n_embd = power(20);
    request.model.n_vocab = power(24);
    request.model.n_query_heads = static_cast<int>(power(16));
    request.model.n_ff = power(24);
    request.workload.contexts = {power(30)};
    request.workload.concurrency = static_cast<int>(power(20));
    request.engine.ubatch = static_cast<int>(power(24));
    request.engine.max_batched_tokens = static_cast<int>(power(24));
    request.engine.block_tokens = static_cast<int>(power(12));
    request.engine.flash_attention = round % 2 == 0;
    request.engine.unified = round % 4 < 2;
    request.engine.total_context = round % 8 < 4 && request.engine.engine == Engine::kLlamaCpp;
    request.engine.recurrent_copies = static_cast<int>(power(6)) - 1;
    request.weights.bytes = 1'000'000'000'000'000'000;
    request.workload.mmproj_bytes = 1'000'000'000'000'000'000;
    request.pairs = {{"f16", "f16"}};
    const auto plan = MakePlan(request);
    if (!plan.ok()) continue;  // a shape that the engine refuses
    const Candidate& candidate = plan->contexts[0].candidates[0];
    EXPECT_FALSE(candidate.fits) << round;
    EXPECT_GE(candidate.kv_bytes, 0) << round;
    EXPECT_GE(candidate.total_bytes, candidate.kv_bytes) << round;
    for (const Item& item : candidate.items) EXPECT_GE(item.bytes, 0) << round << ItemKindName(item.kind);
    if (request.workload.concurrency < kMaxPlannedConcurrency && !request.engine.total_context) {
      PlanRequest more = request;
      more.workload.concurrency *= 2;
      const auto larger = MakePlan(more);
      ASSERT_TRUE(larger.ok()) << larger.status();
      EXPECT_GE(larger->contexts[0].candidates[0].total_bytes, candidate.total_bytes) << round;
    }
  }
}

}  // namespace
}  // namespace kvtide::planner
