#include "clients/engine/model_config.h"

#include <cmath>

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
  EXPECT_THAT(with("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}), HasSubstr("yarn"));
  EXPECT_THAT(with("rope_scaling", {{"type", "dynamic"}, {"factor", 4.0}}), HasSubstr("dynamic"));
  EXPECT_THAT(with("rope_scaling", {{"type", "linear"}}), HasSubstr("factor is missing"));
  EXPECT_THAT(with("hidden_act", "gelu"), HasSubstr("gelu"));
  EXPECT_THAT(with("mlp_bias", true), HasSubstr("mlp_bias"));
  EXPECT_THAT(with("quantization_config", {{"bits", 4}}), HasSubstr("quantization_config"));
  EXPECT_THAT(with("layer_types", {"full_attention", "chunked_attention"}), HasSubstr("chunked_attention"));
  EXPECT_THAT(with("layer_types", {"full_attention"}), HasSubstr("layer_types has 1 entries"));
  EXPECT_THAT(with("partial_rotary_factor", 0.5), HasSubstr("partial_rotary_factor"));
}

TEST(ModelConfigTest, RefusesSizesThatMakeNoSense) {
  const auto with = [](const char* key, const json& value) {
    json config = Llama();
    config[key] = value;
    return Refusal(config);
  };
  EXPECT_THAT(with("num_hidden_layers", 0), HasSubstr("num_hidden_layers is 0"));
  EXPECT_THAT(with("num_hidden_layers", -5), HasSubstr("num_hidden_layers is -5"));
  EXPECT_THAT(with("num_hidden_layers", "32"), HasSubstr("not an integer"));
  EXPECT_THAT(with("num_key_value_heads", 5), HasSubstr("cannot share"));
  EXPECT_THAT(with("head_dim", 127), HasSubstr("odd head_dim"));
  EXPECT_THAT(with("hidden_size", 1ll << 40), HasSubstr("hidden_size"));
  EXPECT_THAT(with("eos_token_id", 200000), HasSubstr("eos_token_id"));
  EXPECT_THAT(with("rms_norm_eps", "small"), HasSubstr("rms_norm_eps"));
  json config = Llama();
  config.erase("vocab_size");
  EXPECT_THAT(Refusal(config), HasSubstr("vocab_size is missing"));
  EXPECT_FALSE(ParseModelConfig("{").ok());
  EXPECT_FALSE(ParseModelConfig("[]").ok());
}

}  // namespace
}  // namespace kvtide::engine
