// Models in GGUF files: the same logits as from a folder, and what is refused. Values of the quantised types
// are in gguf_blocks_test.cc, real files in real_models_test.cc.
#include "clients/engine/model_files.h"

#include "clients/engine/llama_model.h"
#include "clients/engine/local_kv_store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/engine/test_gguf.h"

namespace kvtide::engine {
namespace {

using testing::HasSubstr;

ModelConfig SmallLlama() {
  ModelConfig c;
  c.architecture = "LlamaForCausalLM";
  c.hidden_size = 36;
  c.intermediate_size = 52;
  c.layers = 2;
  c.query_heads = 4;
  c.kv_heads = 2;
  c.head_dim = 12;
  c.vocab_size = 50;
  c.max_positions = 256;
  return c;
}

std::string Error(const GgufWriter& file) {
  const std::string path = MakeFolder("gguf_error") + "/m.gguf";
  WriteFile(path, file.Bytes());
  const auto files = ModelFiles::Open(path);
  return files.ok() ? "no error" : std::string(files.status().message());
}

TEST(GgufModelTest, GivesTheLogitsOfTheDefinition) {
  for (const bool tied : {true, false})
    for (const bool biased : {true, false}) {
      ModelConfig config = SmallLlama();
      config.tied_embeddings = tied;
      config.qkv_bias = biased;
      const TestTensors weights = RandomWeights(config, 5);
      GgufWriter file;
      WriteLlamaGguf(config, weights, file);
      const std::string path = MakeFolder("gguf") + "/model.gguf";
      WriteFile(path, file.Bytes());
      ThreadPool pool(2);
      const auto model = LlamaModel::Load(path, pool);
      ASSERT_TRUE(model.ok()) << model.status();
      const std::vector<int32_t> tokens = {3, 49, 0, 17, 17, 8, 30};
      const std::vector<double> expected = ReferenceLogits(config, weights, tokens);
      LocalKvStore store((*model)->kv_geometry(), DataType::kF32, pool);
      std::vector<float> hidden, logits(expected.size());
      ASSERT_TRUE((*model)->Forward(store, *store.CreateSequence(), 0, tokens, &hidden).ok());
      (*model)->Logits(hidden.data(), static_cast<int>(tokens.size()), logits.data());
      for (size_t i = 0; i < logits.size(); ++i) ASSERT_NEAR(logits[i], expected[i], 2e-4) << i;
    }
}

TEST(GgufModelTest, DividesFrequenciesByTheFilesFactors) {
  const ModelConfig config = SmallLlama();
  GgufWriter file;
  WriteLlamaGguf(config, RandomWeights(config, 5), file);
  file.Tensor("rope_freqs.weight", TestTensor{{6}, {1, 1, 2, 4, 8, 8}});
  const std::string path = MakeFolder("gguf_rope") + "/model.gguf";
  WriteFile(path, file.Bytes());
  const auto files = ModelFiles::Open(path);
  ASSERT_TRUE(files.ok()) << files.status();
  const std::vector<double> plain = RopeFrequencies(config), divided = RopeFrequencies(files->config());
  const double by[] = {1, 1, 2, 4, 8, 8};
  for (size_t i = 0; i < 6; ++i) EXPECT_DOUBLE_EQ(divided[i] * by[i], plain[i]);
}

TEST(GgufModelTest, NamesWhatIsMissingOrNotComputed) {
  const ModelConfig config = SmallLlama();
  const TestTensors weights = RandomWeights(config, 1);
  GgufWriter other;
  other.Text("general.architecture", "mamba");
  EXPECT_THAT(Error(other), HasSubstr("the architecture mamba"));
  EXPECT_THAT(Error(GgufWriter()), HasSubstr("general.architecture"));
  GgufWriter bare;
  bare.Text("general.architecture", "llama");
  EXPECT_THAT(Error(bare), HasSubstr("'llama.block_count' is missing"));
  GgufWriter experts;
  WriteLlamaGguf(config, weights, experts);
  experts.Integer("llama.expert_count", 8);
  EXPECT_THAT(Error(experts), HasSubstr("mixtures of experts"));
  GgufWriter yarn;
  WriteLlamaGguf(config, weights, yarn);
  yarn.Text("llama.rope.scaling.type", "yarn");
  EXPECT_THAT(Error(yarn), HasSubstr("rope scaling yarn"));
}

TEST(GgufModelTest, RefusesEveryTruncation) {
  const ModelConfig config = SmallLlama();
  GgufWriter file;
  WriteLlamaGguf(config, RandomWeights(config, 1), file);
  const std::string bytes = file.Bytes(), path = MakeFolder("gguf_cut") + "/m.gguf";
  for (size_t size = 1; size < bytes.size(); size += 397) {
    WriteFile(path, bytes.substr(0, size));
    EXPECT_FALSE(ModelFiles::Open(path).ok()) << size;
  }
}

}  // namespace
}  // namespace kvtide::engine
