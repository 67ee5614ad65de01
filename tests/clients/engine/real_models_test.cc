// Real models in GGUF files: token ids and perplexity of a short text as an independent computation in
// float64 gives them (reference_model.py MODEL.gguf tests/data/wikitext2_slice.txt 192). tests/models.sh
// brings the files; without them these tests are skipped.
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "clients/engine/llama_model.h"
#include "clients/engine/local_kv_store.h"
#include "clients/engine/tokenizer.h"
#include "clients/engine/vector_math.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::engine {
namespace {

struct RealModel {
  const char* file;
  std::vector<int32_t> first_tokens;
  double perplexity;  // of the first 192 tokens
};

std::string ModelPath(const std::string& file) {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  std::string folder = variable("KVTIDE_MODELS");
  if (folder.empty()) {
    const std::string cache = variable("XDG_CACHE_HOME");
    folder = (cache.empty() ? variable("HOME") + "/.cache" : cache) + "/kvtide/models";
  }
  return folder + "/" + file;
}

class RealModelTest : public testing::TestWithParam<RealModel> {};

TEST_P(RealModelTest, GivesTheTokensAndThePerplexityOfTheReference) {
  const std::string path = ModelPath(GetParam().file);
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there; tests/models.sh brings it";
  std::ifstream in("tests/data/wikitext2_slice.txt", std::ios::binary);
  std::string text(20000, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  const auto tokenizer = Tokenizer::Load(path);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto encoded = (*tokenizer)->EncodeText(text);
  ASSERT_TRUE(encoded.ok()) << encoded.status();
  const std::vector<int32_t> tokens(encoded->begin(), encoded->begin() + 192);
  EXPECT_EQ(std::vector<int32_t>(tokens.begin(), tokens.begin() + 24), GetParam().first_tokens);

  ThreadPool pool(0);
  const auto model = LlamaModel::Load(path, pool);
  ASSERT_TRUE(model.ok()) << model.status();
  LocalKvStore store((*model)->kv_geometry(), DataType::kF32, pool);
  const SequenceId sequence = *store.CreateSequence();
  const auto vocabulary = static_cast<size_t>((*model)->config().vocab_size);
  std::vector<float> hidden, logits(64 * vocabulary);
  double loss = 0;
  for (size_t at = 0; at < tokens.size(); at += 64) {
    ASSERT_TRUE(
        (*model)->Forward(store, sequence, static_cast<int64_t>(at), {tokens.data() + at, 64}, &hidden).ok());
    (*model)->Logits(hidden.data(), 64, logits.data());
    for (size_t t = 0; t < 64 && at + t + 1 < tokens.size(); ++t) {
      const float* row = logits.data() + t * vocabulary;
      loss += LogSumExp(row, vocabulary) - static_cast<double>(row[tokens[at + t + 1]]);
    }
  }
  EXPECT_NEAR(std::exp(loss / 191), GetParam().perplexity, 5e-4 * GetParam().perplexity);
}

INSTANTIATE_TEST_SUITE_P(
    Files, RealModelTest,
    testing::Values(RealModel{"smollm2-135m-q4_1.gguf",
                              {3717, 446, 6356, 2067, 5131, 46,   446,  3717, 3717,  6356,  2067, 5131,
                               46,   314, 354,  2321, 4771, 3297, 8552, 284,  16984, 17523, 1673, 909},
                              35.860894},
                    RealModel{"gemma3-270m-q4_k_m.gguf",
                              {2,   236743, 107, 578,  9877,   655, 4984, 236813, 578,  236743, 107,   236743,
                               107, 9877,   655, 4984, 236813, 563, 614,  5422,   4103, 1031,   13617, 532},
                              21.849808}),
    [](const testing::TestParamInfo<RealModel>& test) {
      return std::string(test.param.file).substr(0, 6) == "gemma3" ? "Gemma3" : "SmolLM2";
    });

}  // namespace
}  // namespace kvtide::engine
