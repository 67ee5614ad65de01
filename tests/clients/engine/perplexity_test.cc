// The engine as a whole against the reference perplexity of the bundled model, which another implementation
// measured.
#include <cmath>
#include <fstream>

#include "clients/engine/llama_model.h"
#include "clients/engine/local_kv_store.h"
#include "clients/engine/tokenizer.h"
#include "clients/engine/vector_math.h"
#include "gtest/gtest.h"

namespace kvtide::engine {
namespace {

TEST(PerplexityTest, OneWindowOfTheBundledTextIsAsFrozen) {
  constexpr char kFolder[] = "clients/engine/models/tidelm-7m";
  constexpr int kContext = 4096, kChunk = 512;
  ThreadPool pool(0);
  const auto tokenizer = Tokenizer::Load(kFolder);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto model = LlamaModel::Load(kFolder, pool);
  ASSERT_TRUE(model.ok()) << model.status();
  std::ifstream in("tests/data/wikitext2_slice.txt", std::ios::binary);
  const std::string text(std::istreambuf_iterator<char>(in), {});
  std::vector<int32_t> tokens = *(*tokenizer)->Encode(text);
  EXPECT_GE(tokens.size(), 24u * kContext);
  tokens.insert(tokens.begin(), 0);

  LocalKvStore store((*model)->kv_geometry(), DataType::kF16, pool);
  const SequenceId sequence = store.CreateSequence().value();
  const int vocab = (*model)->config().vocab_size;
  std::vector<float> hidden, logits(static_cast<size_t>(kChunk) * vocab);
  double loss = 0;
  for (int at = 0; at < kContext; at += kChunk) {
    ASSERT_TRUE((*model)->Forward(store, sequence, at, {tokens.data() + at, kChunk}, &hidden).ok());
    (*model)->Logits(hidden.data(), kChunk, logits.data());
    for (int i = 0; i < kChunk && at + i + 1 < kContext; ++i) {
      const float* row = logits.data() + static_cast<size_t>(i) * vocab;
      loss += LogSumExp(row, vocab) - row[tokens[at + i + 1]];
    }
  }
  // All 24 windows: 15.8598, the reference in bfloat16 is 15.8638.
  EXPECT_NEAR(std::exp(loss / (kContext - 1)), 14.3069, 0.001);
}

}  // namespace
}  // namespace kvtide::engine
