// vLLM's pool, against worked examples from its own logs and issues.
#include "planner/engines/vllm.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

EngineOptions Options() {
  EngineOptions options;
  options.engine = Engine::kVllm;
  return options;
}

const TypePair kHalf{"bf16", "bf16"};

TEST(Vllm, Gemma4PoolOfUnifiedPages) {
  const auto model = FindModel("gemma-4-26b-a4b");
  const auto groups = GroupLayers(*model);
  const auto pool = MakeVllmPool(Options(), groups, kHalf);
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_EQ(pool->page_bytes, 131072);
  EXPECT_EQ(pool->group_layers, 5);
  EXPECT_EQ(pool->BlockBytes(), 655360);
  EXPECT_EQ(*VllmBlocksPerRequest(Options(), groups, kHalf, 32768), 1024 + 5 * 193);
  EXPECT_EQ(*VllmBlocksPerRequest(Options(), groups, kHalf, 131072), 5061);
}

TEST(Vllm, Gemma31BWithTensorParallelMatchesTheReportedBlock) {
  // flashinfer-ai/flashinfer #3327: 655,360 bytes per block with 4 GPUs.
  const auto model = FindModel("gemma-4-31b");
  const auto pool = MakeVllmPool(Options(), GroupLayers(ShardHeads(*model, 4)), kHalf);
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_EQ(pool->BlockBytes(), 655360);
}

TEST(Vllm, OneKindNeedsNoUnifying) {
  const auto model = FindModel("llama-3.1-8b");
  const auto sizer = MakeVllmSizer(Options(), GroupLayers(*model), {"f16", "f16"});
  ASSERT_TRUE(sizer.ok());
  EXPECT_EQ((*sizer)->Bytes({32768, 1, 0}).Cache(), 4096 * kMiB);
  EXPECT_EQ((*sizer)->Bytes({32769, 1, 0}).Cache(), 4096 * kMiB + 16 * 128 * kKiB);
  EXPECT_TRUE((*sizer)->rewrites().empty());
}

TEST(Vllm, RaisedBlocksAreSaid) {
  const auto model = FindModel("gemma-4-26b-a4b");
  const auto sizer = MakeVllmSizer(Options(), GroupLayers(*model), kHalf);
  EXPECT_THAT((*sizer)->rewrites(), ::testing::ElementsAre(::testing::HasSubstr("raised from 16 to 32")));
}

TEST(Vllm, SharedPrefixSharesWholeBlocks) {
  const auto model = FindModel("llama-3.1-8b");
  const auto sizer = MakeVllmSizer(Options(), GroupLayers(*model), {"f16", "f16"});
  EXPECT_EQ((*sizer)->Bytes({8192, 4, 4100}).Cache(), (256 + 4 * 256) * 16 * 128 * kKiB);
}

// 656 bytes (fp8_ds_mla: 512 fp8, four f32 scales, 64 bf16) only beside an indexer; dense latents are plain
// fp8.
TEST(Vllm, Fp8LatentsTake656BytesBesideAnIndexer) {
  const auto latent = [](const char* name) {
    const auto model = FindModel(name);
    return (*MakeVllmSizer(Options(), GroupLayers(*model), {"fp8", "none"}))->Bytes({16, 1, 0}).latent;
  };
  EXPECT_EQ(latent("deepseek-v3"), 16 * 61 * 576);
  EXPECT_EQ(latent("deepseek-v3.2"), 16 * 61 * (656 + 132));
}

TEST(Vllm, PerHeadScalesAreCounted) {
  const auto model = FindModel("llama-3.1-8b");
  const auto groups = GroupLayers(*model);
  EXPECT_EQ((*MakeVllmSizer(Options(), groups, {"int8", "int8"}))->Bytes({16, 1, 0}).Cache(),
            16 * 32 * 8 * 2 * (128 + 4));
  EXPECT_EQ((*MakeVllmSizer(Options(), groups, {"fp8", "tq4"}))->Bytes({16, 1, 0}).Cache(),
            16 * 32 * 8 * 196);
}

TEST(Vllm, RecurrentLayersTakeOnePagePerSequence) {
  const auto model = FindModel("qwen3-next-80b");
  const auto sizer = MakeVllmSizer(Options(), GroupLayers(*model), {"f16", "f16"});
  ASSERT_TRUE(sizer.ok()) << sizer.status();
  const KvBytes bytes = (*sizer)->Bytes({8192, 2, 0});
  EXPECT_GE(bytes.recurrent, 2 * 79036416);
  EXPECT_LT(bytes.recurrent, 2 * 79036416 + 2 * 36 * 131072);
}

TEST(Vllm, UnknownPairsListTheKnown) {
  const auto model = FindModel("llama-3.1-8b");
  EXPECT_THAT(std::string(MakeVllmSizer(Options(), GroupLayers(*model), {"q8_0", "q8_0"}).status().message()),
              ::testing::HasSubstr("known: f16/f16"));
  EXPECT_EQ(VllmCacheDtype({"fp8", "fp8"}), "fp8");
}

// DeepSeek V3.2: 132 bytes per token and layer (128 fp8, one f32 scale) beside the latents; GLM-5.2 in 21 of
// 78 layers.
TEST(Vllm, IndexerKeysLieBesideThePool) {
  EngineOptions options;
  options.engine = Engine::kVllm;
  const KvLoad load{65536, 2, 0};
  const auto bytes = [&](const char* name, const TypePair& pair) {
    const ModelGeometry model = *FindModel(name);
    return (*MakeKvSizer(options, model, GroupLayers(model), pair))->Bytes(load).Cache();
  };
  EXPECT_EQ(bytes("deepseek-v3.2", {"f16", "none"}), int64_t{2} * 65536 * 61 * (1152 + 132));
  EXPECT_EQ(bytes("deepseek-v3.2", {"fp8", "none"}), int64_t{2} * 65536 * 61 * (656 + 132));
  EXPECT_EQ(bytes("glm-5.2", {"f16", "none"}), int64_t{2} * 65536 * (78 * 1152 + 21 * 132));
}

}  // namespace
}  // namespace kvtide::planner
