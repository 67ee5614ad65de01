// Synthetic GGUF files for every kind of layer, and damaged ones: each gives one clear error.
#include "planner/model/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_format.h"
#include "planner/model/catalogue.h"
#include "planner/model/gguf_geometry.h"
#include "planner/model/load_model.h"
#include "tests/planner/gguf_builder.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<ModelGeometry> Geometry(const GgufBuilder& builder, const ReadOptions& options = {}) {
  const absl::StatusOr<GgufFile> file = ParseGguf(builder.Build());
  if (!file.ok()) return file.status();
  return GeometryFromGguf(*file, "test", options);
}

std::vector<LayerKind> Kinds(const ModelGeometry& model) {
  std::vector<LayerKind> kinds;
  for (const LayerGeometry& layer : model.layers) kinds.push_back(layer.kind);
  return kinds;
}

int Count(const ModelGeometry& model, LayerKind kind) {
  const std::vector<LayerKind> kinds = Kinds(model);
  return static_cast<int>(std::count(kinds.begin(), kinds.end(), kind));
}

std::string Error(const std::string& bytes) {
  const absl::StatusOr<GgufFile> file = ParseGguf(bytes);
  return file.ok() ? "no error" : std::string(file.status().message());
}

TEST(Gguf, FullAttentionTakesHeadDimFromWidth) {
  const auto model = Geometry(PlainGguf());
  ASSERT_TRUE(model.ok()) << model.status();
  ASSERT_EQ(model->layers.size(), 4u);
  EXPECT_EQ(model->layers[0], (LayerGeometry{LayerKind::kFull, 2, 64, 64}));
  EXPECT_EQ(model->max_context, 32768);
  EXPECT_THAT(model->assumptions, ::testing::Contains(HasSubstr("key_length is missing")));
}

TEST(Gguf, ArrayValuedKvHeadsAndSlidingPattern) {
  GgufBuilder builder;
  builder.String("general.architecture", "gemma4")
      .U32("gemma4.block_count", 6)
      .U32("gemma4.embedding_length", 2816)
      .U32("gemma4.attention.head_count", 16)
      .U32s("gemma4.attention.head_count_kv", {8, 8, 8, 8, 8, 2})
      .U32("gemma4.attention.key_length", 512)
      .U32("gemma4.attention.value_length", 512)
      .U32("gemma4.attention.key_length_swa", 256)
      .U32("gemma4.attention.value_length_swa", 256)
      .U32("gemma4.attention.sliding_window", 1024)
      .Bools("gemma4.attention.sliding_window_pattern", {true, true, true, true, true, false})
      .Strings("tokenizer.ggml.tokens", {"a", "b", "c"});
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers[0], (LayerGeometry{LayerKind::kSliding, 8, 256, 256, 1024}));
  EXPECT_EQ(model->layers[5], (LayerGeometry{LayerKind::kFull, 2, 512, 512}));
  EXPECT_EQ(model->n_vocab, 3);
}

TEST(Gguf, IntegerPatternLeavesLastLayerOfEveryPeriodFull) {
  GgufBuilder builder = PlainGguf("gemma3");
  builder.U32("gemma3.attention.sliding_window", 1024).U32("gemma3.attention.sliding_window_pattern", 3);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(Kinds(*model), ::testing::ElementsAre(LayerKind::kSliding, LayerKind::kSliding,
                                                    LayerKind::kFull, LayerKind::kSliding));
}

TEST(Gguf, MissingPatternUsesTheArchitecturesOwnAndSaysSo) {
  GgufBuilder builder;
  builder.String("general.architecture", "gemma3")
      .U32("gemma3.block_count", 34)
      .U32("gemma3.embedding_length", 2560)
      .U32("gemma3.attention.head_count", 8)
      .U32("gemma3.attention.head_count_kv", 4)
      .U32("gemma3.attention.key_length", 256)
      .U32("gemma3.attention.value_length", 256)
      .U32("gemma3.attention.sliding_window", 1024);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(Count(*model, LayerKind::kSliding), 29);  // 34 layers, not 28 as a test of il % 6 != 0 gives
  EXPECT_THAT(model->assumptions, ::testing::Contains(HasSubstr("period 6")));
}

TEST(Gguf, UnknownArchitectureWithWindowButNoPatternStops) {
  GgufBuilder builder = PlainGguf("newarch");
  builder.U32("newarch.attention.sliding_window", 512);
  EXPECT_THAT(std::string(Geometry(builder).status().message()),
              HasSubstr("newarch.attention.sliding_window_pattern"));
}

TEST(Gguf, LlamaIgnoresAWindow) {
  GgufBuilder builder = PlainGguf();
  builder.U32("llama.attention.sliding_window", 4096);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(Count(*model, LayerKind::kFull), 4);
  EXPECT_THAT(model->assumptions, ::testing::Contains(HasSubstr("is ignored")));
}

TEST(Gguf, SharedLayersReadTheLastOwnerOfTheirKind) {
  GgufBuilder builder = PlainGguf("gemma4");
  builder.U32("gemma4.attention.sliding_window", 512)
      .Bools("gemma4.attention.sliding_window_pattern", {true, false, true, false})
      .U32("gemma4.attention.shared_kv_layers", 2);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers[2].kind, LayerKind::kShared);
  EXPECT_EQ(model->layers[2].shared_with, 0);
  EXPECT_EQ(model->layers[3].shared_with, 1);
}

TEST(Gguf, SharingWithoutAnOwnerOfTheKindStops) {
  GgufBuilder builder = PlainGguf("gemma4");
  builder.U32("gemma4.attention.sliding_window", 512)
      .Bools("gemma4.attention.sliding_window_pattern", {true, true, true, false})
      .U32("gemma4.attention.shared_kv_layers", 1);
  EXPECT_THAT(std::string(Geometry(builder).status().message()), HasSubstr("no earlier layer owns"));
}

TEST(Gguf, LatentLayersCacheOneVector) {
  GgufBuilder builder = PlainGguf("deepseek2");
  builder.U32("deepseek2.attention.kv_lora_rank", 512)
      .U32("deepseek2.rope.dimension_count", 64)
      .U32("deepseek2.attention.key_length_mla", 192)
      .U32("deepseek2.attention.value_length_mla", 128);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers[0], (LayerGeometry{LayerKind::kMla, 1, 576, 0}));
}

TEST(Gguf, RecurrentLayersByIntervalMatchTheCatalogue) {
  GgufBuilder builder;
  builder.String("general.architecture", "qwen3next")
      .U32("qwen3next.block_count", 48)
      .U32("qwen3next.embedding_length", 2048)
      .U32("qwen3next.attention.head_count", 16)
      .U32("qwen3next.attention.head_count_kv", 2)
      .U32("qwen3next.attention.key_length", 256)
      .U32("qwen3next.attention.value_length", 256)
      .U32("qwen3next.full_attention_interval", 4)
      .U32("qwen3next.ssm.conv_kernel", 4)
      .U32("qwen3next.ssm.inner_size", 4096)
      .U32("qwen3next.ssm.state_size", 128)
      .U32("qwen3next.ssm.time_step_rank", 32)
      .U32("qwen3next.ssm.group_count", 16);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  const auto catalogue = FindModel("qwen3-next-80b");
  ASSERT_TRUE(catalogue.ok());
  EXPECT_EQ(model->layers, catalogue->layers);  // 36 states of 2,195,456 bytes: 75.4 MiB
}

TEST(Gguf, RecurrentLayersByZeroKvHeads) {
  GgufBuilder builder;
  builder.String("general.architecture", "nemotron_h")
      .U32("nemotron_h.block_count", 3)
      .U32("nemotron_h.embedding_length", 512)
      .U32("nemotron_h.attention.head_count", 8)
      .U32s("nemotron_h.attention.head_count_kv", {0, 2, 0})
      .U32("nemotron_h.ssm.conv_kernel", 4)
      .U32("nemotron_h.ssm.inner_size", 1024)
      .U32("nemotron_h.ssm.state_size", 16)
      .U32("nemotron_h.ssm.group_count", 1);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(Kinds(*model),
              ::testing::ElementsAre(LayerKind::kRecurrent, LayerKind::kFull, LayerKind::kRecurrent));
  EXPECT_EQ(model->layers[0].state_bytes, 4 * (3 * (1024 + 2 * 16) + 16 * 1024));
}

TEST(Gguf, ZeroKvHeadsWithoutStateOwnNothing) {
  GgufBuilder builder;
  builder.String("general.architecture", "deci")
      .U32("deci.block_count", 2)
      .U32("deci.embedding_length", 512)
      .U32("deci.attention.head_count", 8)
      .U32s("deci.attention.head_count_kv", {0, 2});
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers[0].kind, LayerKind::kNone);
}

TEST(Gguf, ChunkedLayersOfLlama4) {
  GgufBuilder builder = PlainGguf("llama4");
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(Kinds(*model), ::testing::ElementsAre(LayerKind::kChunked, LayerKind::kChunked,
                                                    LayerKind::kChunked, LayerKind::kFull));
  EXPECT_EQ(model->layers[0].window, 8192);
}

// States as llama.cpp allocates them, in f32 per sequence.
TEST(Gguf, DeltaAttentionOfKimiLinear) {
  GgufBuilder builder = PlainGguf("kimi-linear");  // 4 heads of 128
  builder.U32("kimi-linear.ssm.conv_kernel", 4).U32("kimi-linear.kda.head_dim", 128);
  builder.U32("kimi-linear.attention.kv_lora_rank", 512).U32("kimi-linear.rope.dimension_count", 64);
  builder.U32("kimi-linear.full_attention_interval", 4);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(Kinds(*model), ::testing::ElementsAre(LayerKind::kRecurrent, LayerKind::kRecurrent,
                                                    LayerKind::kRecurrent, LayerKind::kMla));
  const int64_t inner = int64_t{model->n_query_heads} * 128;
  EXPECT_EQ(model->layers[0].state_bytes, 4 * (3 * 3 * inner + 128 * inner));
}

TEST(Gguf, RwkvHasNoCacheButAState) {
  GgufBuilder builder = PlainGguf("rwkv7");
  builder.U32("rwkv7.wkv.head_size", 64);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  for (const LayerGeometry& layer : model->layers) {
    EXPECT_EQ(layer.kind, LayerKind::kRecurrent);
    EXPECT_EQ(layer.state_bytes, 4 * (2 * model->n_embd + 64 * model->n_embd));
  }
}

// DeepSeek V3.2: llama.cpp keeps one indexer key of 128 values per token and layer in the type of K; 61
// layers at 65536 tokens are 976 MiB in f16.
TEST(Gguf, IndexerKeysOfDeepSeek32) {
  GgufBuilder builder = PlainGguf("deepseek32");
  builder.U32("deepseek32.attention.kv_lora_rank", 512).U32("deepseek32.rope.dimension_count", 64);
  builder.U32("deepseek32.attention.indexer.head_count", 64).U32("deepseek32.attention.indexer.top_k", 2048);
  EXPECT_THAT(std::string(Geometry(builder).status().message()), HasSubstr("indexer.key_length"));
  builder.U32("deepseek32.attention.indexer.key_length", 128);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE(model->uncounted.empty());
  EXPECT_EQ(model->layers, std::vector<LayerGeometry>(4, FindModel("DeepSeek-V3.2")->layers[0]));
}

TEST(Gguf, ArchitecturesThatTheFileDoesNotTellAreRefusedByName) {
  for (const char* arch : {"deepseek4", "falcon-h1", "glm5next"}) {
    const auto model = Geometry(PlainGguf(arch));
    EXPECT_EQ(model.status().code(), absl::StatusCode::kUnimplemented) << arch;
    EXPECT_THAT(std::string(model.status().message()), HasSubstr(arch));
  }
}

// Nemotron-H: a layer without KV heads is Mamba only when it has no feed-forward part.
TEST(Gguf, FeedForwardLayersOfNemotronHKeepNoState) {
  GgufBuilder builder;
  builder.String("general.architecture", "nemotron_h")
      .U32("nemotron_h.block_count", 4)
      .U32("nemotron_h.embedding_length", 512)
      .U32("nemotron_h.attention.head_count", 8)
      .U32s("nemotron_h.attention.head_count_kv", {0, 0, 2, 0})
      .U32s("nemotron_h.feed_forward_length", {0, 1024, 0, 1024});
  builder.U32("nemotron_h.ssm.conv_kernel", 4).U32("nemotron_h.ssm.inner_size", 256);
  builder.U32("nemotron_h.ssm.state_size", 16).U32("nemotron_h.ssm.group_count", 1);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(Kinds(*model), ::testing::ElementsAre(LayerKind::kRecurrent, LayerKind::kNone, LayerKind::kFull,
                                                    LayerKind::kNone));
}

TEST(Gguf, NextTokenLayersAreNotCounted) {
  GgufBuilder builder = PlainGguf("glm4moe");
  builder.U32("glm4moe.nextn_predict_layers", 1);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers.size(), 3u);
}

TEST(Gguf, UnknownCacheKeyStopsWithItsNameOrIsNoted) {
  GgufBuilder builder = PlainGguf();
  builder.U32("llama.attention.compressor_ratio", 4);
  EXPECT_THAT(std::string(Geometry(builder).status().message()),
              HasSubstr("llama.attention.compressor_ratio"));
  const auto model = Geometry(builder, {true});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(model->uncounted, ::testing::Contains(HasSubstr("compressor_ratio")));
}

TEST(Gguf, WeightsLeaveTheTokenEmbeddingOnTheCpuUnlessTied) {
  GgufBuilder builder = PlainGguf();
  builder.Tensor("token_embd.weight", {512, 1000}, 1).Tensor("blk.0.attn_q.weight", {512, 512}, 2);
  auto file = ParseGguf(builder.Build());
  ASSERT_TRUE(file.ok()) << file.status();
  const int64_t embedding = 512 * 1000 * 2, q = 512 * 512 / 32 * 18;
  EXPECT_EQ(file->tensor_bytes, embedding + q);
  EXPECT_EQ(GgufDeviceBytes(*file), embedding + q);  // tied
  builder.Tensor("output.weight", {512, 1000}, 14);
  file = ParseGguf(builder.Build());
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(GgufDeviceBytes(*file), q + 512 * 1000 / 256 * 210);
}

TEST(Gguf, ExpertsGiveActiveParameters) {
  GgufBuilder builder = PlainGguf();
  builder.U32("llama.expert_count", 8)
      .U32("llama.expert_used_count", 2)
      .Tensor("blk.0.ffn_up_exps.weight", {512, 512, 8}, 1)
      .Tensor("blk.0.attn_q.weight", {512, 512}, 1);
  const auto model = Geometry(builder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->params_total, 512 * 512 * 9);
  EXPECT_EQ(model->params_active, 512 * 512 * 3);
}

TEST(Gguf, SplitFilesAreSummed) {
  const std::filesystem::path folder =
      std::filesystem::path(::testing::TempDir()) / ("kvtide_gguf_split_" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  for (int part = 1; part <= 2; ++part) {
    GgufBuilder builder = part == 1 ? PlainGguf() : GgufBuilder();
    builder.U32("split.count", 2)
        .U32("split.no", static_cast<uint32_t>(part - 1))
        .Tensor(absl::StrFormat("t%d", part), {64}, 0);
    std::ofstream(folder / absl::StrFormat("m-%05d-of-00002.gguf", part), std::ios::binary)
        << builder.Build();
  }
  const auto model = LoadModel((folder / "m-00001-of-00002.gguf").string());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->weights->bytes, 2 * 64 * 4);
  EXPECT_THAT(std::string(ReadGguf((folder / "m-00002-of-00002.gguf").string()).status().message()),
              HasSubstr("name the first part"));
  std::filesystem::remove(folder / "m-00002-of-00002.gguf");
  EXPECT_THAT(std::string(ReadGguf((folder / "m-00001-of-00002.gguf").string()).status().message()),
              HasSubstr("cannot be opened"));
  std::filesystem::remove_all(folder);
}

TEST(Gguf, HeadersLargerThanTheFirstReadAreReadOn) {
  const std::string path = ::testing::TempDir() + "/kvtide_large_" + std::to_string(getpid()) + ".gguf";
  GgufBuilder builder = PlainGguf();
  builder.String("tokenizer.chat_template", std::string(3 << 20, 'x')).Tensor("t", {64}, 0);
  std::ofstream(path, std::ios::binary) << builder.Build();
  const auto file = ReadGguf(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->tensors.size(), 1u);
  std::filesystem::remove(path);
}

TEST(GgufDamaged, EveryTruncationIsOneClearError) {
  GgufBuilder builder = PlainGguf();
  builder.Strings("tokenizer.ggml.tokens", {"a", "bc"}).Tensor("t", {64}, 0);
  const std::string whole = builder.Build();
  ASSERT_TRUE(ParseGguf(whole).ok());
  for (size_t n = 0; n < whole.size(); ++n) {
    const auto file = ParseGguf(whole.substr(0, n));
    ASSERT_FALSE(file.ok()) << n;
    EXPECT_TRUE(absl::IsOutOfRange(file.status())) << n << " " << file.status();
    EXPECT_THAT(std::string(file.status().message()), HasSubstr("truncated")) << n;
  }
}

TEST(GgufDamaged, WrongMagicVersionAndCounts) {
  EXPECT_THAT(Error("GGML" + std::string(60, '\0')), HasSubstr("does not begin with 'GGUF'"));
  EXPECT_THAT(Error(GgufBuilder(1).Build()), HasSubstr("version 1 is not supported"));
  EXPECT_THAT(Error(GgufBuilder(0x03000000).Build()), HasSubstr("big-endian"));
  EXPECT_THAT(Error(PlainGguf().Build(uint64_t{1} << 60, 1)), HasSubstr("absurd counts"));
  EXPECT_THAT(Error(PlainGguf().Build(0, uint64_t{1} << 60)), HasSubstr("absurd counts"));
}

TEST(GgufDamaged, HugeStringsAndArrays) {
  std::string key;
  GgufBuilder::Append(&key, uint64_t{1} << 40);
  EXPECT_THAT(Error(GgufBuilder().Raw(key).Build()), HasSubstr("a metadata key of 1099511627776 bytes"));
  std::string array;
  GgufBuilder::Append(&array, uint64_t{1});
  array += "k";
  GgufBuilder::Append(&array, uint32_t{9});
  GgufBuilder::Append(&array, uint32_t{4});
  GgufBuilder::Append(&array, uint64_t{1} << 62);
  EXPECT_THAT(Error(GgufBuilder().Raw(array).Build()), HasSubstr("metadata 'k': an array of"));
}

TEST(GgufDamaged, TensorsWithAbsurdShapes) {
  EXPECT_THAT(Error(PlainGguf().Tensor("t", {1, 1, 1, 1, 1}, 0).Build()), HasSubstr("5 dimensions"));
  EXPECT_THAT(Error(PlainGguf().Tensor("t", {uint64_t{1} << 40, uint64_t{1} << 40}, 0).Build()),
              HasSubstr("absurdly large"));
  EXPECT_THAT(Error(PlainGguf().Tensor("t", {64}, 999).Build()), HasSubstr("unknown type 999"));
  EXPECT_THAT(Error(PlainGguf().Tensor("t", {33}, 2).Build()), HasSubstr("not a multiple of 32"));
}

TEST(GgufDamaged, NegativeAndAbsurdFields) {
  GgufBuilder builder;
  builder.String("general.architecture", "llama").U64("llama.block_count", uint64_t{1} << 50);
  EXPECT_THAT(std::string(Geometry(builder).status().message()), HasSubstr("llama.block_count"));
  EXPECT_THAT(std::string(Geometry(GgufBuilder()).status().message()), HasSubstr("general.architecture"));
  GgufBuilder text = PlainGguf();
  text.String("llama.expert_count", "many");
  EXPECT_THAT(std::string(Geometry(text).status().message()), HasSubstr("llama.expert_count"));
  GgufBuilder few;
  few.String("general.architecture", "llama")
      .U32("llama.block_count", 4)
      .U32("llama.embedding_length", 512)
      .U32("llama.attention.head_count", 8)
      .U32s("llama.attention.head_count_kv", {2, 2});
  EXPECT_THAT(std::string(Geometry(few).status().message()), HasSubstr("has 2 entries, 4 are needed"));
}

}  // namespace
}  // namespace kvtide::planner
