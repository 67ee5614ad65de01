// Geometry from config.json: every way in which models say which layers cache what.
#include "planner/model/config_json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "planner/model/catalogue.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

Json Plain() {
  return {{"model_type", "llama"},           {"num_hidden_layers", 4}, {"num_attention_heads", 8},
          {"num_key_value_heads", 2},        {"hidden_size", 512},     {"vocab_size", 1000},
          {"max_position_embeddings", 8192}, {"rms_norm_eps", 1e-5},   {"initializer_range", 0.02},
          {"attention_bias", false}};
}

absl::StatusOr<ModelGeometry> Read(const Json& config, const ReadOptions& options = {}) {
  return GeometryFromConfigJson(config.dump(), "test", options);
}

std::string Error(const Json& config) {
  const auto model = Read(config);
  return model.ok() ? "no error" : std::string(model.status().message());
}

int Count(const ModelGeometry& model, LayerKind kind) {
  int n = 0;
  for (const LayerGeometry& layer : model.layers) n += layer.kind == kind;
  return n;
}

TEST(ConfigJson, FullAttention) {
  const auto model = Read(Plain());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers.size(), 4u);
  EXPECT_EQ(model->layers[0], (LayerGeometry{LayerKind::kFull, 2, 64, 64}));
  EXPECT_THAT(model->assumptions, ::testing::Contains(HasSubstr("head_dim is missing")));
}

TEST(ConfigJson, NestedTextConfigAndNullHeadDim) {
  Json config = Plain();
  config["head_dim"] = nullptr;
  const auto model = Read(
      {{"model_type", "mistral3"}, {"vision_config", {{"num_hidden_layers", 24}}}, {"text_config", config}});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers[0].head_dim_k, 64);
}

TEST(ConfigJson, Gemma4HasHeadsOfItsOwnOnFullLayers) {
  Json text = Plain();
  text.update({{"model_type", "gemma4_text"},
               {"num_hidden_layers", 30},
               {"num_attention_heads", 16},
               {"num_key_value_heads", 8},
               {"hidden_size", 2816},
               {"head_dim", 256},
               {"global_head_dim", 512},
               {"num_global_key_value_heads", 2},
               {"attention_k_eq_v", true},
               {"sliding_window", 1024},
               {"num_kv_shared_layers", 0},
               {"hidden_size_per_layer_input", 0}});
  for (int i = 0; i < 30; ++i)
    text["layer_types"].push_back(i % 6 == 5 ? "full_attention" : "sliding_attention");
  const auto model = Read({{"model_type", "gemma4"}, {"text_config", text}});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers, FindModel("gemma-4-26b-a4b")->layers);
  text["attention_k_eq_v"] = false;  // then the global count is not used
  EXPECT_EQ(Read(text)->layers[5].n_kv_heads, 8);
}

TEST(ConfigJson, SharedLayers) {
  Json config = Plain();
  config["layer_types"] = {"sliding_attention", "full_attention", "sliding_attention", "full_attention"};
  config["sliding_window"] = 512;
  config["num_kv_shared_layers"] = 2;
  const auto model = Read(config);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers[2].shared_with, 0);
  EXPECT_EQ(model->layers[3].shared_with, 1);
  config["num_kv_shared_layers"] = 4;
  EXPECT_THAT(Error(config), HasSubstr("num_kv_shared_layers"));
}

TEST(ConfigJson, QwenWindowIsOffUnlessAskedFor) {
  Json config = Plain();
  config.update({{"model_type", "qwen2"},
                 {"sliding_window", 131072},
                 {"max_window_layers", 2},
                 {"use_sliding_window", false}});
  auto model = Read(config);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(Count(*model, LayerKind::kFull), 4);
  config["use_sliding_window"] = true;
  model = Read(config);
  EXPECT_EQ(Count(*model, LayerKind::kSliding), 2);
  EXPECT_EQ(model->layers[0].kind, LayerKind::kFull);
}

TEST(ConfigJson, PatternsAndWholeModelsThatSlide) {
  Json config = Plain();
  config.update({{"model_type", "gemma2"}, {"sliding_window", 4096}});
  EXPECT_EQ(Count(*Read(config), LayerKind::kSliding), 2);
  config["model_type"] = "mistral";
  EXPECT_EQ(Count(*Read(config), LayerKind::kSliding), 4);
  config["sliding_window_pattern"] = 4;
  EXPECT_EQ(Count(*Read(config), LayerKind::kSliding), 3);
  // So transformers writes it of Gemma 3, beside layer_types, which say more.
  config.erase("sliding_window_pattern");
  config["_sliding_window_pattern"] = 2;
  const auto read = Read(config);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(Count(*read, LayerKind::kSliding), 2);
}

TEST(ConfigJson, LatentLayers) {
  Json config = Plain();
  config.update({{"model_type", "deepseek_v3"},
                 {"kv_lora_rank", 512},
                 {"qk_rope_head_dim", 64},
                 {"qk_nope_head_dim", 128},
                 {"v_head_dim", 128},
                 {"q_lora_rank", 1536},
                 {"n_routed_experts", 256},
                 {"num_experts_per_tok", 8}});
  const auto model = Read(config);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers[0], (LayerGeometry{LayerKind::kMla, 1, 576, 0}));
  EXPECT_EQ(model->n_experts, 256);
  config.erase("qk_rope_head_dim");
  EXPECT_THAT(Error(config), HasSubstr("qk_rope_head_dim"));
}

TEST(ConfigJson, LinearAttentionMatchesTheCatalogue) {
  Json config = Plain();
  config.update({{"model_type", "qwen3_next"},
                 {"num_hidden_layers", 48},
                 {"num_attention_heads", 16},
                 {"hidden_size", 2048},
                 {"head_dim", 256},
                 {"full_attention_interval", 4},
                 {"linear_num_key_heads", 16},
                 {"linear_num_value_heads", 32},
                 {"linear_key_head_dim", 128},
                 {"linear_value_head_dim", 128},
                 {"linear_conv_kernel_dim", 4}});
  const auto model = Read(config);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers, FindModel("qwen3-next-80b")->layers);
}

TEST(ConfigJson, HybridPatternWithMambaAndMlp) {
  Json config = Plain();
  config.update({{"model_type", "nemotron_h"},
                 {"hybrid_override_pattern", "M-*E"},
                 {"mamba_num_heads", 8},
                 {"mamba_head_dim", 64},
                 {"ssm_state_size", 128},
                 {"n_groups", 2},
                 {"conv_kernel", 4}});
  const auto model = Read(config);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers[0].kind, LayerKind::kRecurrent);
  EXPECT_EQ(model->layers[0].state_bytes, 4 * (3 * (512 + 2 * 256) + 128 * 512));
  EXPECT_EQ(model->layers[1].kind, LayerKind::kNone);
  EXPECT_EQ(model->layers[2].kind, LayerKind::kFull);
  config["hybrid_override_pattern"] = "M-?E";
  EXPECT_THAT(Error(config), HasSubstr("unknown kind '?'"));
}

TEST(ConfigJson, ChunkedAttention) {
  Json config = Plain();
  config.update(
      {{"model_type", "llama4_text"}, {"attention_chunk_size", 8192}, {"no_rope_layer_interval", 4}});
  const auto model = Read(config);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(Count(*model, LayerKind::kChunked), 3);
  EXPECT_EQ(model->layers[0].window, 8192);
}

TEST(ConfigJson, UnknownFieldStopsWithItsName) {
  Json config = Plain();
  config["kv_compressor_window"] = 7;
  EXPECT_THAT(Error(config), HasSubstr("unknown field 'kv_compressor_window' = 7"));
  const auto model = Read(config, {true});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(model->uncounted, ::testing::Contains(HasSubstr("kv_compressor_window")));
  config["kv_compressor_window"] = nullptr;  // off
  EXPECT_TRUE(Read(config).ok());
}

TEST(ConfigJson, UnknownLayerTypeStopsWithItsName) {
  Json config = Plain();
  config["layer_types"] = {"full_attention", "hyper_attention", "full_attention", "full_attention"};
  EXPECT_THAT(Error(config), HasSubstr("\"hyper_attention\" for layer 1"));
}

TEST(ConfigJson, BadFieldsAreNamed) {
  EXPECT_THAT(std::string(GeometryFromConfigJson("{", "x").status().message()),
              HasSubstr("not a JSON object"));
  EXPECT_THAT(std::string(GeometryFromConfigJson("[]", "x").status().message()),
              HasSubstr("not a JSON object"));
  for (const char* field : {"num_hidden_layers", "num_attention_heads", "hidden_size"}) {
    for (const Json& bad : {Json(-1), Json("x"), Json(1.5), Json(0), Json(1e300)}) {
      Json config = Plain();
      config[field] = bad;
      EXPECT_THAT(Error(config), HasSubstr(field)) << bad;
    }
    Json config = Plain();
    config.erase(field);
    EXPECT_THAT(Error(config), HasSubstr(field));
  }
  Json config = Plain();
  config["num_attention_heads"] = 7;
  EXPECT_THAT(Error(config), HasSubstr("head_dim"));
  config = Plain();
  config["num_hidden_layers"] = 1000000;
  EXPECT_THAT(Error(config), HasSubstr("num_hidden_layers"));
}

}  // namespace
}  // namespace kvtide::planner
