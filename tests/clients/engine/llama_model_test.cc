#include "clients/engine/llama_model.h"

#include <cmath>
#include <random>

#include "clients/engine/local_kv_store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/engine/test_model.h"

namespace kvtide::engine {
namespace {

using testing::HasSubstr;

// A llama: 3 layers, 4 query heads on 2 KV heads of 12 values, nothing a multiple of a vector.
constexpr char kConfig[] =
    R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 36, "intermediate_size": 52,
  "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 97,
  "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0)";

struct Case {
  const char* name;
  std::string config;  // the rest of kConfig
  const char* weight_type;
};

class LlamaModelTest : public testing::TestWithParam<Case> {};

std::vector<int32_t> RandomTokens(int n, int vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(n);
  for (int32_t& t : tokens) t = static_cast<int32_t>(random() % vocab);
  return tokens;
}

std::vector<float> RunInChunks(const LlamaModel& model, KvStore& store, const std::vector<int32_t>& tokens,
                               int chunk) {
  const SequenceId sequence = store.CreateSequence().value();
  std::vector<float> logits, hidden;
  for (int at = 0; at < static_cast<int>(tokens.size()); at += chunk) {
    const int n = std::min<int>(chunk, static_cast<int>(tokens.size()) - at);
    const absl::Status status =
        model.Forward(store, sequence, at, {tokens.data() + at, static_cast<size_t>(n)}, &hidden);
    EXPECT_TRUE(status.ok()) << status;
    logits.resize(logits.size() + static_cast<size_t>(n) * model.config().vocab_size);
    model.Logits(hidden.data(), n, logits.data() + static_cast<size_t>(at) * model.config().vocab_size);
  }
  EXPECT_TRUE(store.Close(sequence).ok());
  return logits;
}

TEST_P(LlamaModelTest, ComputesTheDefinitionWhateverTheChunks) {
  const std::string config_text = std::string(kConfig) + GetParam().config + "}";
  const auto config = ParseModelConfig(config_text);
  ASSERT_TRUE(config.ok()) << config.status();
  const TestTensors weights = RandomWeights(*config, /*seed=*/11);
  const std::string folder = MakeFolder(GetParam().name);
  WriteFile(folder + "/config.json", config_text);
  WriteFile(folder + "/model.safetensors", SafetensorsBytes(weights, GetParam().weight_type));
  ThreadPool pool(2);
  const auto model = LlamaModel::Load(folder, pool);
  ASSERT_TRUE(model.ok()) << model.status();

  const std::vector<int32_t> tokens = RandomTokens(150, config->vocab_size, /*seed=*/5);
  const std::vector<double> expected = ReferenceLogits(*config, weights, tokens);
  for (const int chunk : {150, 64, 1}) {
    LocalKvStore store((*model)->kv_geometry(), DataType::kF32, pool);
    const std::vector<float> logits = RunInChunks(**model, store, tokens, chunk);
    ASSERT_EQ(logits.size(), expected.size());
    double worst = 0;
    for (size_t i = 0; i < logits.size(); ++i) worst = std::max(worst, std::abs(logits[i] - expected[i]));
    EXPECT_LT(worst, 2e-4) << "chunks of " << chunk;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Family, LlamaModelTest,
    testing::Values(Case{"llama", R"(, "tie_word_embeddings": true)", "BF16"}, Case{"untied", "", "F32"},
                    Case{"half", "", "F16"},
                    Case{"llama3",
                         R"(, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 64})",
                         "BF16"},
                    Case{"biased", R"(, "attention_bias": true)", "BF16"},
                    Case{"windowed", R"(, "sliding_window": 70)", "BF16"}),
    [](const testing::TestParamInfo<Case>& test) { return std::string(test.param.name); });

// A model of random weights with this config.json gives the logits of the reference in float64.
void CheckAgainstReference(const std::string& architecture, const std::string& text, double most,
                           ThreadPool& pool) {
  const auto config = ParseModelConfig(text);
  ASSERT_TRUE(config.ok()) << config.status();
  const TestTensors weights = RandomWeights(*config, /*seed=*/3);
  const std::string folder = MakeFolder(architecture);
  WriteFile(folder + "/config.json", text);
  WriteFile(folder + "/model.safetensors", SafetensorsBytes(weights, "BF16"));
  const auto model = LlamaModel::Load(folder, pool);
  ASSERT_TRUE(model.ok()) << model.status();
  const std::vector<int32_t> tokens = RandomTokens(40, config->vocab_size, /*seed=*/6);
  const std::vector<double> expected = ReferenceLogits(*config, weights, tokens);
  LocalKvStore store((*model)->kv_geometry(), DataType::kF32, pool);
  const std::vector<float> logits = RunInChunks(**model, store, tokens, 16);
  for (size_t i = 0; i < logits.size(); ++i)
    ASSERT_NEAR(logits[i], expected[i], most) << architecture << " " << i;
}

TEST(LlamaModelFamilyTest, Qwen2HasBiasesAndQwen3NormsItsHeads) {
  ThreadPool pool(2);
  for (const std::string architecture : {"Qwen2ForCausalLM", "Qwen3ForCausalLM"}) {
    std::string text = std::string(kConfig) + R"(, "tie_word_embeddings": true})";
    text.replace(text.find("LlamaForCausalLM"), 16, architecture);
    CheckAgainstReference(architecture, text, 2e-4, pool);
  }
}

// Gemma: norms around every part, soft-caps, windows by turns with a rotation of their own; Phi-3: fused
// matrices.
TEST(LlamaModelFamilyTest, GemmaAndPhi) {
  ThreadPool pool(2);
  const std::pair<const char*, const char*> families[] = {
      {"Gemma2ForCausalLM",
       R"("hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 20, "sliding_window": 9,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "tie_word_embeddings": true})"},
      {"Gemma3ForCausalLM",
       R"("hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 11,
        "sliding_window_pattern": 3, "rope_local_base_freq": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}})"},
      {"Gemma3ForCausalLM", R"("hidden_activation": "gelu_pytorch_tanh", "sliding_window": 11,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 30000.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}})"},
      {"Phi3ForCausalLM", R"("hidden_act": "silu", "sliding_window": 30})"}};
  for (const auto& [architecture, rest] : families) {
    SCOPED_TRACE(architecture);
    std::string text = std::string(kConfig) + ", " + rest;
    text.replace(text.find("LlamaForCausalLM"), 16, architecture);
    const size_t act = text.find(R"("hidden_act": "silu", "rope)");
    text.erase(act, 22);
    CheckAgainstReference(architecture, text, 5e-4, pool);
  }
}

TEST(LlamaModelLoadTest, NamesTheTensorThatIsMissingOrHasAnotherShape) {
  const std::string text = std::string(kConfig) + R"(, "tie_word_embeddings": true})";
  TestTensors weights = RandomWeights(*ParseModelConfig(text), /*seed=*/1);
  const std::string folder = MakeFolder("incomplete");
  WriteFile(folder + "/config.json", text);
  ThreadPool pool(1);

  weights["model.layers.1.mlp.up_proj.weight"].shape = {36, 52};
  WriteFile(folder + "/model.safetensors", SafetensorsBytes(weights, "BF16"));
  absl::Status status = LlamaModel::Load(folder, pool).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("up_proj.weight has the shape [36, 52], the model's sizes ask for [52, 36]"));

  weights.erase("model.layers.1.mlp.up_proj.weight");
  WriteFile(folder + "/model.safetensors", SafetensorsBytes(weights, "BF16"));
  status = LlamaModel::Load(folder, pool).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model.layers.1.mlp.up_proj.weight"));
}

TEST(LlamaModelForwardTest, RefusesTokensOutsideTheVocabulary) {
  ThreadPool pool(1);
  const auto model = LlamaModel::Load("clients/engine/models/tidelm-7m", pool);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ((*model)->parameters(), 6'950'144);
  LocalKvStore store((*model)->kv_geometry(), DataType::kF16, pool);
  const SequenceId sequence = store.CreateSequence().value();
  const std::vector<int32_t> tokens = {1, 4096};
  std::vector<float> hidden;
  EXPECT_EQ((*model)->Forward(store, sequence, 0, tokens, &hidden).code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtide::engine
