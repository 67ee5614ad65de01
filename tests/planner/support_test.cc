#include "planner/engines/support.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/engines/kv_sizer.h"
#include "planner/model/catalogue.h"
#include "planner/plan/matrix.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

SupportLevel Level(const TypePair& pair, int head_dim, const std::string& build = "auto") {
  return FindSupport(Engine::kLlamaCpp, build, pair, head_dim, head_dim).level;
}

TEST(Support, LlamaCppVectorKernelStopsAt256) {
  EXPECT_EQ(Level({"q8_0", "q8_0"}, 128), SupportLevel::kNative);
  EXPECT_EQ(Level({"q8_0", "q8_0"}, 512), SupportLevel::kDequantise);
  EXPECT_EQ(Level({"f16", "f16"}, 512), SupportLevel::kNative);
  EXPECT_EQ(Level({"q8_0", "turbo4"}, 256), SupportLevel::kNative);
  EXPECT_EQ(Level({"q8_0", "turbo4"}, 512), SupportLevel::kDequantise);
  EXPECT_EQ(Level({"q8_0", "pq4"}, 512), SupportLevel::kNative);
}

TEST(Support, PairsThatAreNotCompiledRunOnTheCpu) {
  EXPECT_EQ(Level({"q8_0", "q4_0"}, 128), SupportLevel::kCpuFallback);
  EXPECT_EQ(Level({"q5_1", "q5_1"}, 128), SupportLevel::kCpuFallback);
  EXPECT_EQ(Level({"f16", "bf16"}, 128), SupportLevel::kCpuFallback);
}

TEST(Support, UnknownTypesAreRefused) {
  EXPECT_EQ(Level({"q8_0", "turbo4"}, 128, "upstream"), SupportLevel::kRefused);
  EXPECT_EQ(FindSupport(Engine::kKvtide, "", {"q9", "f16"}, 128, 128).level, SupportLevel::kRefused);
  EXPECT_EQ(FindSupport(Engine::kKvtide, "", {"f16", "f16"}, 576, 512).level, SupportLevel::kRefused);
  EXPECT_EQ(FindSupport(Engine::kVllm, "", {"tq4", "tq4"}, 576, 0).level, SupportLevel::kRefused);
}

TEST(Support, WorstLayerDecides) {
  EngineOptions options;
  options.engine = Engine::kLlamaCpp;
  const auto groups = GroupLayers(*FindModel("gemma-4-26b-a4b"));  // 256 and 512
  const Support support = FindSupport(options, {"q8_0", "turbo4"}, groups);
  EXPECT_EQ(support.level, SupportLevel::kDequantise);
  EXPECT_THAT(support.reason, HasSubstr("at 512"));
}

TEST(Support, QuantisedVNeedsFlashAttention) {
  EngineOptions options;
  options.engine = Engine::kLlamaCpp;
  options.flash_attention = false;
  const auto groups = GroupLayers(*FindModel("llama-3.1-8b"));
  EXPECT_EQ(FindSupport(options, {"q8_0", "q8_0"}, groups).level, SupportLevel::kRefused);
  EXPECT_EQ(FindSupport(options, {"f16", "f16"}, groups).level, SupportLevel::kNative);
}

TEST(Support, KvtideRunsEveryPairAtEveryHeadDim) {
  for (const TypePair& pair : DefaultPairs(Engine::kKvtide, false)) {
    for (int head_dim : {64, 80, 96, 112, 128, 192, 256, 512}) {
      EXPECT_EQ(FindSupport(Engine::kKvtide, "", pair, head_dim, head_dim).level, SupportLevel::kNative)
          << pair.Name() << head_dim;
    }
  }
}

TEST(Support, MatrixShowsScratch) {
  const auto rows = SupportMatrix(Engine::kLlamaCpp, "auto", {{"q8_0", "turbo4"}, {"f16", "f16"}}, {64, 512});
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_EQ(rows[0].scratch_bytes_per_token, 2 * (64 + 128));  // turbo4 pads heads of 64 to 128
  EXPECT_EQ(rows[3].scratch_bytes_per_token, 0);
  EXPECT_THAT(RenderMatrix(rows), HasSubstr("the vector kernel stops at head dim 256"));
}

}  // namespace
}  // namespace kvtide::planner
