#include "clients/engine/model_config.h"

#include <cmath>
#include <span>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace kvtide::engine {
namespace {

using nlohmann::json;
using testing::HasSubstr;

json Llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 4096},
          {"intermediate_size", 14336},
          {"num_hidden_layers", 32},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 8},
          {"vocab_size", 128256},
          {"max_position_embeddings", 131072},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 500000.0},
          {"bos_token_id", 128000},
          {"eos_token_id", {128001, 128009}}};
}

std::string Refusal(const json& config) {
  const auto model = ParseModelConfig(config.dump());
  return model.ok() ? "accepted" : std::string(model.status().message());
}

TEST(ModelConfigTest, ReadsALlama3Folder) {
  json config = Llama();
  config["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 8192}};
  const auto model = ParseModelConfig(config.dump());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->head_dim, 128);
  EXPECT_EQ(model->group(), 4);
  EXPECT_EQ(model->bos_token, 128000);
  EXPECT_THAT(model->eos_tokens, testing::ElementsAre(128001, 128009));
  EXPECT_FALSE(model->tied_embeddings);
  // Fast channels keep their frequency, slow ones turn 8 times slower.
  const std::vector<double> f = RopeFrequencies(*model);
  ASSERT_EQ(f.size(), 64u);
  EXPECT_DOUBLE_EQ(f[0], 1.0);
  EXPECT_DOUBLE_EQ(f[10], std::pow(500000.0, -20.0 / 128));
  EXPECT_DOUBLE_EQ(f[63], std::pow(500000.0, -126.0 / 128) / 8);
  EXPECT_GT(f[31], std::pow(500000.0, -62.0 / 128) / 8);
  EXPECT_LT(f[31], std::pow(500000.0, -62.0 / 128));
}

// Frequencies and factor of transformers 5.24 (modeling_rope_utils), head dim 64.
TEST(ModelConfigTest, YarnIsThatOfTransformers) {
  json config = Llama();
  config["head_dim"] = 64;
  config["rope_theta"] = 1000000.0;
  config["max_position_embeddings"] = 131072;
  config["rope_scaling"] = {
      {"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32768}};
  const double qwen[] = {1.0,
                         0.6493816375732422,
                         0.4216965138912201,
                         0.2738419771194458,
                         0.17782793939113617,
                         0.11547820270061493,
                         0.07498941570520401,
                         0.04869675263762474,
                         0.03162277862429619,
                         0.02053525112569332,
                         0.01333521492779255,
                         0.00865964312106371,
                         0.005154795479029417,
                         0.0030431177001446486,
                         0.0017785303061828017,
                         0.001026617712341249,
                         0.0005833333707414567,
                         0.00032469083089381456,
                         0.0001757068675942719,
                         9.128064994001761e-05,
                         4.4456985051510856e-05,
                         2.8869548259535804e-05,
                         1.8747356079984456e-05,
                         1.2174188668723218e-05,
                         7.905693564680405e-06,
                         5.133812464919174e-06,
                         3.3338035336782923e-06,
                         2.1649109385180054e-06,
                         1.405853367941745e-06,
                         9.129353202297352e-07,
                         5.928434347879374e-07,
                         3.8498163235090033e-07};
  const auto expect = [](const json& folder, std::span<const double> wanted, double factor) {
    const auto model = ParseModelConfig(folder.dump());
    ASSERT_TRUE(model.ok()) << model.status();
    const std::vector<double> f = RopeFrequencies(*model);
    ASSERT_EQ(f.size(), wanted.size());
    for (size_t i = 0; i < f.size(); ++i) EXPECT_NEAR(f[i], wanted[i], 2e-6 * wanted[i]) << i;
    EXPECT_NEAR(model->rope_attention_factor, factor, 1e-9);
  };
  expect(config, qwen, 1.138629436111989);
  // The last eight of a config that sets everything itself.
  config["rope_theta"] = 10000.0;
  config["rope_scaling"] = {
      {"rope_type", "yarn"}, {"factor", 16.0}, {"original_max_position_embeddings", 4096},
      {"beta_fast", 24},     {"beta_slow", 2}, {"attention_factor", 1.5}};
  const auto model = ParseModelConfig(config.dump());
  ASSERT_TRUE(model.ok()) << model.status();
  const std::vector<double> f = RopeFrequencies(*model);
  EXPECT_NEAR(f[12], 0.028658142313361168, 1e-8);
  EXPECT_NEAR(f[16], 0.0053125000558793545, 1e-9);
  EXPECT_NEAR(f[20], 0.0004941059742122889, 1e-10);
  EXPECT_NEAR(f[31], 8.33450940262992e-06, 1e-11);
  EXPECT_EQ(model->rope_attention_factor, 1.5);
}

TEST(ModelConfigTest, ReadsTheBundledModel) {
  const auto model = ReadModelConfig("clients/engine/models/tidelm-7m");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers, 6);
  EXPECT_EQ(model->head_dim, 128);
  EXPECT_EQ(model->rope_theta, 500000);
  EXPECT_TRUE(model->tied_embeddings);
  EXPECT_EQ(ReadModelConfig("/no/such/folder").status().code(), absl::StatusCode::kNotFound);
}

TEST(ModelConfigTest, RefusesByNameWhatWouldChangeTheResult) {
  const auto with = [](const char* key, const json& value) {
    json config = Llama();
    config[key] = value;
    return Refusal(config);
  };
  EXPECT_THAT(with("architectures", {"GptOssForCausalLM"}), HasSubstr("GptOssForCausalLM"));
  EXPECT_THAT(with("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"mscale", 1.0}}),
              HasSubstr("yarn with mscale"));
  EXPECT_THAT(with("rope_scaling", {{"rope_type", "yarn"}, {"factor", -4.0}}), HasSubstr("'factor' is"));
  EXPECT_THAT(with("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"beta_fast", 0.5}}),
              HasSubstr("beta_fast above beta_slow"));
  EXPECT_THAT(with("rope_scaling", {{"rope_type", "longrope"}, {"factor", 4.0}}), HasSubstr("longrope"));
  EXPECT_THAT(with("rope_scaling", {{"type", "dynamic"}, {"factor", 4.0}}), HasSubstr("dynamic"));
  EXPECT_THAT(with("rope_scaling", {{"type", "linear"}}), HasSubstr("'factor' is missing"));
  EXPECT_THAT(with("hidden_act", "gelu"), HasSubstr("gelu"));
  EXPECT_THAT(with("mlp_bias", true), HasSubstr("mlp_bias"));
  EXPECT_THAT(with("quantization_config", {{"bits", 4}}), HasSubstr("quantization_config"));
  json kinds = json::array();
  for (int l = 0; l < 32; ++l) kinds.push_back(l < 31 ? "full_attention" : "chunked_attention");
  EXPECT_THAT(with("layer_types", kinds), HasSubstr("layer is chunked"));
  EXPECT_THAT(with("layers_block_type", json(std::vector<std::string>(32, "mlp"))),
              HasSubstr("layer that is none"));
  EXPECT_THAT(with("num_experts", 8), HasSubstr("mixture"));
  EXPECT_THAT(with("layer_types", {"full_attention"}), HasSubstr("'layer_types' is not a list of 32 names"));
  EXPECT_THAT(with("partial_rotary_factor", 0.5), HasSubstr("partial_rotary_factor"));
}

// Windows are those that the planner counts with.
TEST(ModelConfigTest, WindowsOfLayers) {
  json config = Llama();
  config["sliding_window"] = 4096;
  EXPECT_EQ(ParseModelConfig(config.dump())->sliding_window, 4096);
  config["architectures"] = {"Qwen2ForCausalLM"};
  EXPECT_EQ(ParseModelConfig(config.dump())->sliding_window, 0) << "Qwen2 asks for it first";
  config["use_sliding_window"] = true;
  config["max_window_layers"] = 30;
  auto model = ParseModelConfig(config.dump());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->window(29), 0) << "the first layers see everything";
  EXPECT_EQ(model->window(30), 4096);
  config["max_window_layers"] = 32;
  EXPECT_EQ(ParseModelConfig(config.dump())->window(31), 0);
  // What Gemma's folders leave out.
  config = Llama();
  config["architectures"] = {"Gemma2ForCausalLM"};
  model = ParseModelConfig(config.dump());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->head_dim, 256);
  EXPECT_EQ(model->window(0), 4096);
  EXPECT_EQ(model->window(1), 0);
}

TEST(ModelConfigTest, RefusesSizesThatMakeNoSense) {
  const auto with = [](const char* key, const json& value) {
    json config = Llama();
    config[key] = value;
    return Refusal(config);
  };
  EXPECT_THAT(with("num_hidden_layers", 0), HasSubstr("'num_hidden_layers' is missing or 0"));
  EXPECT_THAT(with("num_hidden_layers", -5), HasSubstr("'num_hidden_layers' is -5"));
  EXPECT_THAT(with("num_hidden_layers", "32"), HasSubstr("expected a whole number"));
  EXPECT_THAT(with("num_key_value_heads", 5), HasSubstr("cannot share"));
  EXPECT_THAT(with("head_dim", 127), HasSubstr("odd head_dim"));
  EXPECT_THAT(with("hidden_size", 1ll << 40), HasSubstr("hidden_size"));
  EXPECT_THAT(with("eos_token_id", 200000), HasSubstr("eos_token_id"));
  EXPECT_THAT(with("rms_norm_eps", "small"), HasSubstr("rms_norm_eps"));
  json config = Llama();
  config.erase("vocab_size");
  EXPECT_THAT(Refusal(config), HasSubstr("'vocab_size' is 0"));
  EXPECT_FALSE(ParseModelConfig("{").ok());
  EXPECT_FALSE(ParseModelConfig("[]").ok());
}

}  // namespace
}  // namespace kvtide::engine
