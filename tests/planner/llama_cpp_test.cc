#include "planner/engines/llama_cpp.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

EngineOptions Options() {
  EngineOptions options;
  options.engine = Engine::kLlamaCpp;
  return options;
}

std::unique_ptr<KvSizer> Sizer(const std::string& model, const TypePair& pair,
                               EngineOptions options = Options()) {
  const auto geometry = FindModel(model);
  auto sizer = MakeKvSizer(options, *geometry, GroupLayers(*geometry), pair);
  EXPECT_TRUE(sizer.ok()) << sizer.status();
  return sizer.ok() ? *std::move(sizer) : nullptr;
}

TEST(LlamaCpp, TrueRatios) {
  const KvLoad load{32768, 1, 0};
  const double f16 = static_cast<double>(Sizer("qwen2.5-3b", {"f16", "f16"})->Bytes(load).Cache());
  EXPECT_DOUBLE_EQ(f16 / 32768, 36 * kKiB);  // 36 KiB per token
  EngineOptions plain = Options();
  plain.rewrites = false;
  EXPECT_DOUBLE_EQ(
      f16 / static_cast<double>(Sizer("qwen2.5-3b", {"turbo3", "turbo3"}, plain)->Bytes(load).Cache()), 5.12);
  EXPECT_NEAR(f16 / static_cast<double>(Sizer("qwen2.5-3b", {"planar3", "f16"})->Bytes(load).Cache()), 1.673,
              0.001);
}

TEST(LlamaCpp, CellsArePaddedTo256) {
  const auto sizer = Sizer("llama-3.1-8b", {"f16", "f16"});
  EXPECT_EQ(sizer->Bytes({1, 1, 0}).Cache(), 256 * 128 * kKiB);
  EXPECT_EQ(sizer->Bytes({257, 1, 0}).Cache(), 512 * 128 * kKiB);
}

TEST(LlamaCpp, SeparateCachesPadEachSequence) {
  EngineOptions options = Options();
  options.unified = false;
  const auto separate = Sizer("llama-3.1-8b", {"f16", "f16"}, options);
  EXPECT_EQ(separate->Bytes({257, 3, 0}).Cache(), 3 * 512 * 128 * kKiB);
  EXPECT_EQ(Sizer("llama-3.1-8b", {"f16", "f16"})->Bytes({257, 3, 0}).Cache(), 1024 * 128 * kKiB);
}

TEST(LlamaCpp, SharedPrefixCountsOnceWhenUnified) {
  const auto sizer = Sizer("llama-3.1-8b", {"f16", "f16"});
  EXPECT_EQ(sizer->Bytes({8192, 4, 4096}).Cache(), (4096 + 4 * 4096) * 128 * kKiB);
}

TEST(LlamaCpp, AutoAsymmetricRewritesK) {
  const auto sizer = Sizer("qwen2.5-3b", {"turbo4", "turbo4"});
  EXPECT_EQ(sizer->effective(), (TypePair{"q8_0", "turbo4"}));
  EXPECT_THAT(sizer->rewrites(), ::testing::ElementsAre(HasSubstr("TURBO_AUTO_ASYMMETRIC=0")));
  EXPECT_EQ(Sizer("gemma-4-26b-a4b", {"turbo4", "turbo4"})->effective().k,
            "turbo4");  // 2 query heads per KV head
}

TEST(LlamaCpp, BoundaryVKeepsFourLayersInQ8) {
  const auto with = Sizer("llama-3.1-8b", {"q8_0", "turbo2"});
  EngineOptions plain = Options();
  plain.rewrites = false;
  const auto without = Sizer("llama-3.1-8b", {"q8_0", "turbo2"}, plain);
  const int64_t row_q8 = 8 * 128 / 32 * 34, row_turbo2 = 8 * 34;
  EXPECT_EQ(with->Bytes({256, 1, 0}).Cache() - without->Bytes({256, 1, 0}).Cache(),
            256 * 4 * (row_q8 - row_turbo2));
}

TEST(LlamaCpp, PaddedHeadsAreSaid) {
  EXPECT_THAT(Sizer("gpt-oss-20b", {"turbo3", "q8_0"})->rewrites(),
              ::testing::Contains(HasSubstr("padded to 128")));
}

TEST(LlamaCpp, ScratchIsOneLayerInF16) {
  const auto sizer = Sizer("gemma-4-26b-a4b", {"q8_0", "pq4"});
  EXPECT_EQ(sizer->ScratchBytes({32768, 1, 0}), 128 * kMiB);  // a full layer: 32768 x 2 x (512 + 512) x 2
  EXPECT_EQ(Sizer("gemma-4-26b-a4b", {"f16", "f16"})->ScratchBytes({32768, 1, 0}), 0);
  EXPECT_EQ(Sizer("llama-3.1-8b", {"f16", "q8_0"})->ScratchBytes({32768, 1, 0}), 32768 * 8 * 128 * 2);
}

TEST(LlamaCpp, PlanarKeepsItsF16KeysResident) {
  // Deferred keys: the f16 copy of all layers is never freed, so planar3/f16 takes more than f16/f16.
  const auto sizer = Sizer("qwen2.5-3b", {"planar3", "f16"});
  const KvLoad load{8192, 1, 0};
  EXPECT_GT(sizer->Bytes(load).Cache() + sizer->ScratchBytes(load),
            Sizer("qwen2.5-3b", {"f16", "f16"})->Bytes(load).Cache());
}

TEST(LlamaCpp, TreesHaveTheirTypes) {
  EXPECT_EQ(ResolveTree("auto", {"q8_0", "q8_0"}), "upstream");
  EXPECT_EQ(ResolveTree("auto", {"q8_0", "turbo4"}), "turboquant");
  EXPECT_EQ(ResolveTree("auto", {"q8_0", "pq4"}), "pairquant");
  EXPECT_EQ(ResolveTree("upstream", {"q8_0", "turbo4"}), "");
  const auto geometry = FindModel("llama-3.1-8b");
  EngineOptions options = Options();
  options.build = "upstream";
  EXPECT_THAT(
      std::string(
          MakeKvSizer(options, *geometry, GroupLayers(*geometry), {"q8_0", "turbo4"}).status().message()),
      AllOf(HasSubstr("upstream tree"), HasSubstr("the turboquant fork has them")));
  EXPECT_THAT(
      std::string(
          MakeKvSizer(Options(), *geometry, GroupLayers(*geometry), {"q9", "f16"}).status().message()),
      HasSubstr("known: f16"));
}

TEST(LlamaCpp, WithoutFlashAttentionVIsAsWideAsTheWidestLayer) {
  // gemma-4-26b-a4b: sliding layers have 8 x 256 values of V, full ones 2 x 512, padded to 2048 when V is
  // transposed: 5 layers x 32768 cells x 1024 values x 2 B.
  EngineOptions options = Options();
  options.flash_attention = false;
  const KvLoad load{32768, 1, 0};
  EXPECT_EQ(Sizer("gemma-4-26b-a4b", {"f16", "f16"}, options)->Bytes(load).Cache() -
                Sizer("gemma-4-26b-a4b", {"f16", "f16"})->Bytes(load).Cache(),
            320 * kMiB);
  EXPECT_EQ(Sizer("llama-3.1-8b", {"f16", "f16"}, options)->Bytes(load).Cache(), 4 * kGiB);
}

TEST(LlamaCpp, SpeculationKeepsRecurrentStatesToGoBackTo) {
  EngineOptions options = Options();
  options.recurrent_copies = 2;
  const KvBytes bytes = Sizer("qwen3.5-27b", {"f16", "f16"}, options)->Bytes({8192, 1, 0});
  EXPECT_NEAR(static_cast<double>(bytes.recurrent) / kMiB, 448.88, 0.01);  // as a log of a 27B hybrid says
}

TEST(LlamaCpp, ServerSlotsShareOrDivideTheContext) {
  EngineOptions shared = Options();
  shared.total_context = true;
  EngineOptions divided = shared;
  divided.unified = false;
  EXPECT_EQ(Sizer("llama-3.1-8b", {"f16", "f16"}, shared)->Bytes({8192, 4, 0}).Cache(), 8192 * 128 * kKiB);
  EXPECT_EQ(Sizer("llama-3.1-8b", {"f16", "f16"}, divided)->Bytes({8192, 4, 0}).Cache(), 8192 * 128 * kKiB);
  // 5000 is padded to 5120; a third of it, 1706, to 1792.
  EXPECT_EQ(LlamaCppCells(divided, 0, 1, {5000, 3, 0}), 1792);
}

TEST(LlamaCpp, RowsThatDoNotDivideAreRefused) {
  ModelGeometry odd;
  odd.layers = {{LayerKind::kFull, 1, 80, 80}};
  EXPECT_THAT(std::string(MakeKvSizer(Options(), odd, GroupLayers(odd), {"q8_0", "q8_0"}).status().message()),
              HasSubstr("not a multiple of the 32"));
}

TEST(LlamaCpp, RecurrentStateIsPerSequence) {
  const KvBytes bytes = Sizer("qwen3-next-80b", {"f16", "f16"})->Bytes({8192, 3, 0});
  EXPECT_EQ(bytes.recurrent, 3 * 79036416);
  EXPECT_EQ(bytes.Cache(), 3 * 192 * kMiB);
}

// Indexer keys lie in the type of K beside the latents: 61 x 128 values x 65536 tokens are 976 MiB in f16.
TEST(LlamaCpp, IndexerKeysAreCountedInTheTypeOfK) {
  const auto f16 = Sizer("deepseek-v3.2", {"f16", "none"});
  const auto v31 = Sizer("deepseek-v3.1", {"f16", "none"});
  const KvLoad load{65536, 1, 0};
  EXPECT_EQ(f16->Bytes(load).Cache() - v31->Bytes(load).Cache(), 976 * kMiB);
  EXPECT_EQ(Sizer("deepseek-v3.2", {"q8_0", "none"})->Bytes(load).Cache(),
            f16->Bytes(load).Cache() * 17 / 32);
  // 21 of 78 layers have an indexer.
  EXPECT_EQ(Sizer("glm-5.2", {"f16", "none"})->Bytes(load).Cache(),
            int64_t{65536} * 2 * (78 * 576 + 21 * 128));
}

// DeepSeek V4 Flash, 43 layers: a window of 128 tokens and the batch in all of them, latents and index keys
// of 4 tokens in 21, latents of 128 tokens in 20, all padded to 256 cells; f32 state of what compresses them.
TEST(LlamaCpp, CompressedLatentsOfDeepSeekV4) {
  const auto sizer = Sizer("deepseek-v4-flash", {"f16", "none"});
  const KvBytes bytes = sizer->Bytes({65536, 1, 0});
  const int64_t window = 43 * 768 * 1024, by4 = 21 * 16384 * (1024 + 256), by128 = 20 * 512 * 1024;
  EXPECT_EQ(bytes.Cache(), window + by4 + by128);
  EXPECT_EQ(bytes.recurrent, 21 * (65536 + 16384) + 20 * 524288);
  // Even one token has 256 cells of each kind.
  EXPECT_EQ(sizer->Bytes({1, 1, 0}).Cache(), 256 * (43 * 1024 + 21 * (1024 + 256) + 20 * 1024));
}

}  // namespace
}  // namespace kvtide::planner
