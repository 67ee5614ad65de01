// The planner's bytes for kvtided against BlockLayout and the exact window, counted block by block.
#include "planner/engines/kvtide_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/format/block_layout.h"
#include "kernels/format/exact_window.h"
#include "planner/model/catalogue.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

EngineOptions Options(ExactWindow window = {}) {
  EngineOptions options;
  options.engine = Engine::kKvtide;
  options.exact_window = window;
  return options;
}

// Counts one block at a time with IsExactBlock and FirstLiveBlock.
int64_t CountByHand(const std::vector<LayerGroup>& groups, const CachePair& pair, ExactWindow window,
                    int64_t tokens) {
  int64_t bytes = 0;
  for (const LayerGroup& group : groups) {
    const GroupShape shape{static_cast<int>(group.layers.size()), group.n_kv_heads, group.head_dim_k,
                           group.head_dim_v};
    const int64_t full = tokens / kBlockTokens;
    for (int64_t block = FirstLiveBlock(tokens, group.window); block * kBlockTokens < tokens; ++block) {
      const bool exact = block >= full || IsExactBlock(block, full, window);
      bytes += static_cast<int64_t>(BlockLayout(shape, exact ? ExactPair() : pair).block_bytes());
    }
  }
  return bytes;
}

TEST(KvtideEngine, EveryLengthMatchesACountBlockByBlock) {
  for (const char* name : {"llama-3.1-8b", "gemma-4-26b-a4b", "gpt-oss-20b"}) {
    const auto model = FindModel(name);
    const auto groups = GroupLayers(*model);
    const ExactWindow windows[] = {{1, 2}, {0, 0}, {3, 1}};
    for (const ExactWindow& window : windows) {
      for (const char* text : {"f16/f16", "q8_0/turbo4", "turbo3/turbo3"}) {
        const CachePair pair = *ParseCachePair(text);
        const auto sizer = MakeKvtideSizer(Options(window), groups, *ParsePair(text));
        ASSERT_TRUE(sizer.ok()) << sizer.status();
        for (int64_t tokens : {1, 63, 64, 65, 127, 128, 192, 193, 300, 1023, 1024, 1087, 1088, 1151, 4096,
                               8191, 32768, 32801}) {
          EXPECT_EQ((*sizer)->Bytes({tokens, 1, 0}).Cache(), CountByHand(groups, pair, window, tokens))
              << name << " " << text << " " << window.first_blocks << "+" << window.last_blocks << " "
              << tokens;
        }
      }
    }
  }
}

// Decoded K and V of one layer, 8 heads of 128, in f16, and a quarter of the limit for partial states.
TEST(KvtideEngine, ScratchIsOneLayerDecodedUpToTheLimit) {
  const auto sizer =
      MakeKvtideSizer(Options(), GroupLayers(*FindModel("llama-3.1-8b")), *ParsePair("turbo4/turbo4"));
  ASSERT_TRUE(sizer.ok()) << sizer.status();
  EXPECT_EQ((*sizer)->ScratchBytes({8192, 3, 0}), 8192 * 8 * 128 * 4 + kKvtideScratchBytes / 4);
  EXPECT_EQ((*sizer)->ScratchBytes({8191, 1, 0}), (*sizer)->ScratchBytes({8192, 1, 0}));
  EXPECT_EQ((*sizer)->ScratchBytes({1 << 20, 1, 0}), kKvtideScratchBytes);
}

TEST(KvtideEngine, PoolsAddUpToTheCache) {
  const auto model = FindModel("gemma-4-26b-a4b");
  const auto groups = GroupLayers(*model);
  const TypePair pair{"q8_0", "turbo3"};
  const KvLoad load{32801, 5, 5000};
  const auto pools = KvtidePools(Options(), groups, pair, load);
  ASSERT_TRUE(pools.ok()) << pools.status();
  int64_t bytes = 0;
  for (const PoolNeed& need : *pools) bytes += need.Bytes();
  EXPECT_EQ(bytes, (*MakeKvtideSizer(Options(), groups, pair))->Bytes(load).Cache());
}

TEST(KvtideEngine, SharedPrefixBlocksCountOnce) {
  const auto model = FindModel("llama-3.1-8b");
  const auto groups = GroupLayers(*model);
  const auto sizer = MakeKvtideSizer(Options(), groups, {"turbo4", "turbo4"});
  const int64_t one = (*sizer)->Bytes({8192, 1, 0}).Cache();
  const GroupShape shape{32, 8, 128, 128};
  const int64_t coded = static_cast<int64_t>(BlockLayout(shape, *ParseCachePair("turbo4")).block_bytes());
  const int64_t exact = static_cast<int64_t>(BlockLayout(shape, ExactPair()).block_bytes());
  // 4100 tokens are 64 whole blocks: the first exact, 63 coded.
  EXPECT_EQ((*sizer)->Bytes({8192, 3, 4100}).Cache(), 3 * one - 2 * (exact + 63 * coded));
}

TEST(KvtideEngine, TrueBitsCountWindowTailScalesAndPadding) {
  const auto model = FindModel("llama-3.1-8b");
  const auto none = MakeKvtideSizer(Options({0, 0}), GroupLayers(*model), {"turbo3", "turbo3"});
  const double values = static_cast<double>((*none)->LiveValues(32768));
  EXPECT_DOUBLE_EQ(8.0 * static_cast<double>((*none)->Bytes({32768, 1, 0}).Cache()) / values, 3.125);
  // The default window of 192 tokens costs (16 - 3.125) x 192 / 32768 bits.
  const auto window = MakeKvtideSizer(Options(), GroupLayers(*model), {"turbo3", "turbo3"});
  EXPECT_NEAR(8.0 * static_cast<double>((*window)->Bytes({32768, 1, 0}).Cache()) / values,
              3.125 + 12.875 * 192 / 32768, 1e-9);
  // Heads of 80 are stored as 96.
  ModelGeometry odd;
  odd.layers = {{LayerKind::kFull, 4, 80, 80}};
  const auto padded = MakeKvtideSizer(Options({0, 0}), GroupLayers(odd), {"f16", "f16"});
  ASSERT_TRUE(padded.ok()) << padded.status();
  EXPECT_EQ((*padded)->Bytes({64, 1, 0}).Cache(), 64 * 4 * 2 * 96 * 2);
  EXPECT_THAT((*padded)->rewrites(),
              ::testing::ElementsAre(::testing::HasSubstr("80/80 are stored as 96/96")));
}

TEST(KvtideEngine, UnfilledTailIsRounding) {
  const auto model = FindModel("llama-3.1-8b");
  const auto sizer = MakeKvtideSizer(Options(), GroupLayers(*model), {"turbo4", "turbo4"});
  EXPECT_EQ((*sizer)->Bytes({8192, 1, 0}).rounding, 0);
  EXPECT_EQ((*sizer)->Bytes({8193, 1, 0}).rounding, 63 * 128 * kKiB);
}

TEST(KvtideEngine, LatentAndChunkedModelsAreRefused) {
  for (const char* name : {"deepseek-v3", "kimi-k2"}) {
    const auto model = FindModel(name);
    EXPECT_FALSE(MakeKvtideSizer(Options(), GroupLayers(*model), {"f16", "f16"}).ok());
  }
}

TEST(KvtideEngine, PairsComeFromTheCatalogueOfFormats) {
  const std::vector<TypePair> pairs = KvtidePairs({});
  EXPECT_THAT(pairs, ::testing::Contains(TypePair{"f16", "f16"}));
  EXPECT_THAT(pairs, ::testing::Contains(TypePair{"q8_0", "turbo4"}));
  for (const TypePair& pair : pairs) EXPECT_TRUE(ParseCachePair(pair.Name()).ok()) << pair.Name();
}

}  // namespace
}  // namespace kvtide::planner
