#include "planner/engines/support.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/engines/kv_sizer.h"
#include "planner/engines/llama_cpp.h"
#include "planner/model/catalogue.h"
#include "planner/plan/matrix.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

Support Find(Engine engine, const TypePair& pair, int dk, int dv, const std::string& build = "newest") {
  EngineOptions options;
  options.engine = engine;
  options.build = build;
  return FindSupport(options, pair, dk, dv);
}

SupportLevel Level(const TypePair& pair, int head_dim, const std::string& build = "newest") {
  return Find(Engine::kLlamaCpp, pair, head_dim, head_dim, build).level;
}

// vLLM 0.33: triton_attn.py refuses an fp8 cache before compute capability 8.9, flashinfer.py (8.0 and newer)
// reads it.
TEST(Support, AnFp8CacheNeedsACardForIt) {
  for (const Engine engine : {Engine::kVllm, Engine::kSglang}) {
    const auto level = [&](int capability) {
      EngineOptions options;
      options.engine = engine;
      options.compute_capability = capability;
      return FindSupport(options, {"fp8", "fp8"}, 128, 128).level;
    };
    EXPECT_EQ(level(75), SupportLevel::kRefused);
    EXPECT_EQ(level(80), SupportLevel::kDequantise);
    EXPECT_EQ(level(86), SupportLevel::kDequantise);
    EXPECT_EQ(level(89), SupportLevel::kNative);
    EXPECT_EQ(level(0), SupportLevel::kNative);  // unknown
  }
}

// ggml-metal's supports_op: equal types of K and V, and f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 or q5_1.
TEST(Support, MetalReadsEqualTypesOfSomeKinds) {
  EngineOptions options;
  options.engine = Engine::kLlamaCpp;
  options.backend = LlamaBackend::kMetal;
  const auto level = [&](const TypePair& pair) { return FindSupport(options, pair, 128, 128).level; };
  EXPECT_EQ(level({"q8_0", "q8_0"}), SupportLevel::kNative);
  EXPECT_EQ(level({"q5_1", "q5_1"}), SupportLevel::kNative);
  EXPECT_EQ(level({"q8_0", "q4_0"}), SupportLevel::kCpuFallback);
  EXPECT_EQ(level({"iq4_nl", "iq4_nl"}), SupportLevel::kCpuFallback);
}

TEST(Support, LlamaCppVectorKernelStopsAt256) {
  EXPECT_EQ(Level({"q8_0", "q8_0"}, 128), SupportLevel::kNative);
  EXPECT_EQ(Level({"q8_0", "q8_0"}, 512), SupportLevel::kDequantise);
  EXPECT_EQ(Level({"f16", "f16"}, 512), SupportLevel::kNative);
  EXPECT_EQ(Level({"q8_0", "turbo4"}, 256), SupportLevel::kNative);
  EXPECT_EQ(Level({"q8_0", "turbo4"}, 512), SupportLevel::kDequantise);
  EXPECT_EQ(Level({"q8_0", "pq4"}, 512), SupportLevel::kNative);
}

// Builds after the change of GGML_CUDA_FA_ALL_QUANTS (ggml-org/llama.cpp #28079) convert on the GPU.
TEST(Support, PairsThatAreNotCompiledRunOnTheCpuInOldBuildsOnly) {
  for (const TypePair& pair : {TypePair{"q8_0", "q4_0"}, TypePair{"q5_1", "q5_1"}, TypePair{"f16", "bf16"}}) {
    EXPECT_EQ(Level(pair, 128, "b10819"), SupportLevel::kCpuFallback) << pair.Name();
    EXPECT_EQ(Level(pair, 128, "b6918"), SupportLevel::kCpuFallback) << pair.Name();
    EXPECT_EQ(Level(pair, 128), SupportLevel::kDequantise) << pair.Name();
    EXPECT_EQ(Level(pair, 128, "upstream"), SupportLevel::kDequantise) << pair.Name();
  }
  EngineOptions options;
  options.engine = Engine::kLlamaCpp;
  options.build = "b10819";
  options.all_quants = true;
  EXPECT_EQ(FindSupport(options, {"q8_0", "q4_0"}, 128, 128).level, SupportLevel::kNative);
}

TEST(Support, OtherBackendsHaveOtherKernels) {
  EngineOptions options;
  options.engine = Engine::kLlamaCpp;
  options.backend = LlamaBackend::kCpu;
  EXPECT_EQ(FindSupport(options, {"q8_0", "q4_0"}, 512, 512).level, SupportLevel::kNative);
  options.backend = LlamaBackend::kMetal;
  EXPECT_EQ(FindSupport(options, {"q5_1", "q5_1"}, 128, 128).level, SupportLevel::kNative);
  EXPECT_EQ(FindSupport(options, {"q8_0", "q4_0"}, 128, 128).level, SupportLevel::kCpuFallback);
}

TEST(Support, ForksAreNamed) {
  EXPECT_TRUE(Find(Engine::kLlamaCpp, {"q8_0", "turbo4"}, 128, 128).NeedsFork());
  EXPECT_FALSE(Find(Engine::kLlamaCpp, {"q8_0", "q8_0"}, 128, 128).NeedsFork());
  EngineOptions options;
  options.engine = Engine::kLlamaCpp;
  for (const TypePair& pair : DefaultPairs(options, false)) {
    EXPECT_FALSE(FindSupport(options, pair, 128, 128).NeedsFork()) << pair.Name();
  }
  options.build = "auto";
  EXPECT_GT(DefaultPairs(options, false).size(), 12u);
  EXPECT_FALSE(CheckLlamaBuild("tq").ok());
  EXPECT_TRUE(CheckLlamaBuild("b12000").ok());
}

TEST(Support, UnknownTypesAreRefused) {
  EXPECT_EQ(Level({"q8_0", "turbo4"}, 128, "upstream"), SupportLevel::kRefused);
  EXPECT_EQ(Find(Engine::kKvtide, {"q9", "f16"}, 128, 128).level, SupportLevel::kRefused);
  EXPECT_EQ(Find(Engine::kKvtide, {"f16", "f16"}, 576, 512).level, SupportLevel::kRefused);
  EXPECT_EQ(Find(Engine::kVllm, {"tq4", "tq4"}, 576, 0).level, SupportLevel::kRefused);
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
  for (const TypePair& pair : DefaultPairs(EngineOptions{}, false)) {
    for (int head_dim : {64, 80, 96, 112, 128, 192, 256, 512}) {
      EXPECT_EQ(Find(Engine::kKvtide, pair, head_dim, head_dim).level, SupportLevel::kNative)
          << pair.Name() << head_dim;
    }
  }
}

TEST(Support, GpusRebuildKeysCalibratedBeforeRope) {
  EngineOptions options;
  options.engine = Engine::kKvtide;
  const TypePair pair{"tide3", "turbo3"};
  EXPECT_THAT(FindSupport(options, pair, 128, 128).reason, HasSubstr("--profile"));
  options.calibrated_keys = CalibratedKeys{"m.profile", "b.txt", 16384, true};
  for (const int dim : {64, 80, 128, 256})
    EXPECT_EQ(FindSupport(options, pair, dim, dim).level, SupportLevel::kDequantise) << dim;
  EXPECT_THAT(FindSupport(options, pair, 64, 64).reason, HasSubstr("about as fast as over f16 pages"));
  EXPECT_EQ(FindSupport(options, {"tide1", "turbo2"}, 64, 64).level, SupportLevel::kDequantise);
  options.calibrated_keys->lowest = false;
  EXPECT_EQ(FindSupport(options, {"tide1", "turbo2"}, 64, 64).level, SupportLevel::kRefused);
  EXPECT_EQ(FindSupport(options, pair, 64, 64).level, SupportLevel::kDequantise);
  options.calibrated_keys->after_rope = true;
  for (const int dim : {64, 80, 128, 256})
    EXPECT_EQ(FindSupport(options, pair, dim, dim).level, SupportLevel::kNative) << dim;
}

TEST(Support, MatrixShowsScratch) {
  EngineOptions options;
  options.engine = Engine::kLlamaCpp;
  const auto rows = SupportMatrix(options, {{"q8_0", "turbo4"}, {"f16", "f16"}}, {64, 512});
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_EQ(rows[0].scratch_bytes_per_token, 2 * (64 + 128));  // turbo4 pads heads of 64 to 128
  EXPECT_EQ(rows[3].scratch_bytes_per_token, 0);
  EXPECT_THAT(RenderMatrix(rows), HasSubstr("the vector kernel stops at head dim 256"));
}

}  // namespace
}  // namespace kvtide::planner
