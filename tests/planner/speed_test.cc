// The roofline against published decode speeds: every point lies inside the printed band.
#include "planner/plan/speed.h"

#include <gtest/gtest.h>

#include "planner/engines/kv_sizer.h"
#include "planner/model/catalogue.h"

namespace kvtide::planner {
namespace {

struct Point {
  const char* model;
  const char* gpu;
  double weights_gb;
  int64_t depth;
  double tokens_per_s;
  const char* source;
};

// One sequence, f16 cache. Weights: the file, or parameters x 4.5 bits.
const Point kPoints[] = {
    {"gemma-4-26b-a4b", "RTX 3090", 14.2, 0, 189.6, "ggml-org/llama.cpp #29152"},
    {"gemma-4-26b-a4b", "RTX 3090", 14.2, 32768, 152.5, "ggml-org/llama.cpp #29152"},
    {"gemma-4-31b", "GB10 DGX Spark", 17.3, 0, 11.55, "AlexsJones/llmfit data"},
    {"gemma-4-26b-a4b", "GB10 DGX Spark", 14.2, 0, 70.6, "AlexsJones/llmfit data"},
    {"qwen3-8b", "RTX PRO 6000 Blackwell", 4.6, 0, 220, "unslothai/unsloth #11349"},
    {"qwen3-8b", "RTX PRO 6000 Blackwell", 4.6, 32768, 126, "unslothai/unsloth #11349"},
    {"llama-3.1-8b", "RTX 6000 Ada", 4.5, 0, 168.9, "source not named"},
    {"gemma-4-26b-a4b", "L4", 14.2, 0, 69.4, "source not named"},
};

TEST(Speed, PublishedPointsLieInTheBand) {
  for (const Point& point : kPoints) {
    const auto model = FindModel(point.model);
    const auto gpu = FindGpu(point.gpu);
    EngineOptions options;
    options.engine = Engine::kLlamaCpp;
    const auto sizer = MakeKvSizer(options, *model, GroupLayers(*model), {"f16", "f16"});
    StepTraffic traffic;
    traffic.weight_bytes = ActiveWeightBytes(*model, static_cast<int64_t>(point.weights_gb * 1e9), 1);
    traffic.kv_bytes = (*sizer)->ReadBytes(point.depth);
    const Speed speed = PredictSpeed(*model, *gpu, traffic, 1);
    ASSERT_TRUE(speed.known);
    EXPECT_LE(speed.tokens_per_s_low, point.tokens_per_s)
        << point.model << " " << point.gpu << " " << point.source;
    EXPECT_GE(speed.tokens_per_s_high, point.tokens_per_s)
        << point.model << " " << point.gpu << " " << point.source;
  }
}

TEST(Speed, UnknownBandwidthPredictsNothing) {
  const auto model = FindModel("llama-3.1-8b");
  DeviceBudget device;
  StepTraffic traffic;
  traffic.weight_bytes = 1 << 30;
  EXPECT_FALSE(PredictSpeed(*model, device, traffic, 1).known);
  device.bandwidth_gb_s = 1000;
  EXPECT_TRUE(PredictSpeed(*model, device, traffic, 1).known);
  traffic.pcie_bytes = 1;  // but no PCIe rate
  EXPECT_FALSE(PredictSpeed(*model, device, traffic, 1).known);
}

TEST(Speed, ReadingAnEightBFromTheHostCosts172MsPerToken) {
  // 4 GiB of f16 KV at 32K over PCIe 4.0 x16 at 25 GB/s effective.
  const auto model = FindModel("llama-3.1-8b");
  DeviceBudget device;
  device.bandwidth_gb_s = 1000;
  device.pcie_gb_s = 32;
  StepTraffic without, with;
  without.weight_bytes = with.weight_bytes = 1'000'000'000;
  with.pcie_bytes = int64_t{4} << 30;
  EXPECT_NEAR(
      PredictSpeed(*model, device, with, 1).step_ms - PredictSpeed(*model, device, without, 1).step_ms, 172,
      1);
}

TEST(Speed, BatchesTouchMoreExperts) {
  const auto model = FindModel("mixtral-8x7b");  // 2 of 8 experts
  const int64_t weights = 26'000'000'000;
  const int64_t one = ActiveWeightBytes(*model, weights, 1), four = ActiveWeightBytes(*model, weights, 4);
  EXPECT_NEAR(static_cast<double>(one) / static_cast<double>(weights), 12.9 / 46.7, 1e-6);
  EXPECT_GT(four, 2 * one);
  EXPECT_LT(four, weights);
  EXPECT_GT(ActiveWeightBytes(*model, weights, 64), weights * 99 / 100);
  const auto dense = FindModel("llama-3.1-8b");
  EXPECT_EQ(ActiveWeightBytes(*dense, weights, 1), weights);
}

}  // namespace
}  // namespace kvtide::planner
