#include "clients/cli/eval/eval_score.h"

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "clients/cli/bundled.h"
#include "clients/cli/eval/eval_layers.h"
#include "clients/cli/eval/eval_needle.h"
#include "clients/cli/eval/eval_state.h"
#include "clients/engine/local_kv_store.h"
#include "clients/engine/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::cli {
namespace {

using engine::KvGeometry;
using engine::LocalKvStore;
using engine::SequenceId;

class EvalTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto folder = BundledModelFolder();
    ASSERT_TRUE(folder.ok()) << folder.status();
    auto tokenizer = engine::Tokenizer::Load(*folder);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = std::move(*tokenizer);
    auto model = engine::LlamaModel::Load(*folder, pool_);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = std::move(*model);
    tokens_ = *tokenizer_->Encode(ReadTextFile(*BundledTextFile())->substr(0, 12000));
    tokens_.insert(tokens_.begin(), 0);
  }

  ThreadPool pool_{2};
  std::unique_ptr<engine::Tokenizer> tokenizer_;
  std::unique_ptr<engine::LlamaModel> model_;
  std::vector<int32_t> tokens_;
};

// Turns every value of V around: predictions must change.
class WrongStore : public LocalKvStore {
 public:
  using LocalKvStore::LocalKvStore;
  absl::Status AppendAttend(SequenceId sequence, int layer, int64_t start, int n, const float* q,
                            const float* k, const float* v, float* out) override {
    std::vector<float> turned(v, v + n * geometry().kv_width());
    for (float& x : turned) x = -x;
    return LocalKvStore::AppendAttend(sequence, layer, start, n, q, k, turned.data(), out);
  }
};

TEST_F(EvalTest, TheSameStoreTwiceHasNoDivergenceAndAWrongOneHasMuch) {
  LocalKvStore a(model_->kv_geometry(), DataType::kF16, pool_),
      b(model_->kv_geometry(), DataType::kF16, pool_);
  WrongStore wrong(model_->kv_geometry(), DataType::kF16, pool_);
  WindowRun run;
  run.tokens = {tokens_.data(), 500};
  run.stores = {&a, &b, &wrong};
  int finished = 0, last_progress = 0;
  run.progress = [&](int tokens) {
    last_progress = tokens;
    return absl::OkStatus();
  };
  run.finished = [&](size_t, SequenceId, PredictionScore* score) {
    ++finished;
    score->stored_bytes = 1000;
    score->stored_tokens = 500;
    return absl::OkStatus();
  };
  const auto scores = ScoreWindow(*model_, pool_, run);
  ASSERT_TRUE(scores.ok()) << scores.status();
  EXPECT_EQ(finished, 3);
  EXPECT_EQ(last_progress, 500);
  EXPECT_EQ((*scores)[0].predictions, 499);
  EXPECT_EQ((*scores)[1].same_top, 499);
  EXPECT_LT((*scores)[1].MeanDivergence(), 1e-6);
  EXPECT_EQ((*scores)[1].loss, (*scores)[0].loss);
  EXPECT_GT((*scores)[2].MeanDivergence(), 0.5);
  EXPECT_GT((*scores)[2].Perplexity(), 1.5 * (*scores)[0].Perplexity());
  EXPECT_LT((*scores)[2].TopAgreement(), 0.9);
  EXPECT_GT((*scores)[2].divergences.Quantile(0.99), (*scores)[2].MeanDivergence());
}

TEST_F(EvalTest, ChunksDoNotChangeTheScoreOfAnExactStore) {
  LocalKvStore store(model_->kv_geometry(), DataType::kF16, pool_);
  double loss[2];
  for (const int i : {0, 1}) {
    WindowRun run;
    run.tokens = {tokens_.data(), 300};
    run.chunk = i == 0 ? 300 : 17;
    run.stores = {&store};
    const auto scores = ScoreWindow(*model_, pool_, run);
    ASSERT_TRUE(scores.ok()) << scores.status();
    loss[i] = (*scores)[0].loss;
  }
  // Sums of another order may round a key to the next f16: 300 losses together stay within 0.01 nats.
  EXPECT_NEAR(loss[0], loss[1], 0.01);
}

TEST_F(EvalTest, StoppingARunClosesItsSequences) {
  LocalKvStore store(model_->kv_geometry(), DataType::kF16, pool_);
  WindowRun run;
  run.tokens = {tokens_.data(), 300};
  run.stores = {&store};
  run.progress = [](int) { return absl::CancelledError("enough"); };
  EXPECT_EQ(ScoreWindow(*model_, pool_, run).status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(store.Close(1).code(), absl::StatusCode::kNotFound);
}

TEST_F(EvalTest, LayerErrorsFallWithMoreBitsAndVanishForF16) {
  const auto vectors = CaptureVectors(*model_, pool_, {tokens_.data(), 256});
  ASSERT_TRUE(vectors.ok()) << vectors.status();
  const auto measure = [&](const std::string& pair) {
    const CachePair parsed = *ParseCachePair(pair);
    std::vector<LayerError> errors;
    for (const LayerVectors& layer : *vectors) {
      const LayerProbe probe(ShapeOf(model_->kv_geometry(), 0), layer, pool_);
      errors.push_back(probe.Measure(parsed, DefaultProfileOptions(parsed.k), {{0, 0}, true}, pool_));
    }
    return errors;
  };
  const auto f16 = measure("f16/f16"), q8 = measure("q8_0/q8_0"), four = measure("turbo4/turbo4"),
             two = measure("turbo2/turbo2");
  ASSERT_EQ(f16.size(), 6u);
  for (size_t l = 0; l < f16.size(); ++l) {
    EXPECT_LT(f16[l].key, 1e-3);
    EXPECT_LT(q8[l].key, four[l].key);
    EXPECT_LT(q8[l].value, four[l].value);
    EXPECT_LT(four[l].logit, two[l].logit);
    // 4 bits of a normal distribution leave about 0.0095 of the energy, 2 bits about 0.12.
    EXPECT_NEAR(four[l].value, std::sqrt(0.0095), 0.02);
    EXPECT_NEAR(two[l].value, std::sqrt(0.12), 0.05);
    // The same order for what attention makes of it.
    EXPECT_LT(f16[l].output, 1e-3);
    EXPECT_LT(q8[l].output, four[l].output);
    EXPECT_LT(four[l].output, two[l].output);
    EXPECT_LT(four[l].weight_kld, two[l].weight_kld);
    EXPECT_GT(four[l].output_cosine, two[l].output_cosine);
    EXPECT_GE(four[l].weight_top1, two[l].weight_top1);
    EXPECT_GT(f16[l].output_cosine, 0.999999);
  }
}

TEST_F(EvalTest, NeedlesStandWhereTheyShouldAndQuestionsFit) {
  std::vector<int32_t> hay;
  while (hay.size() < 2048) hay.insert(hay.end(), tokens_.begin(), tokens_.end());
  const auto task = MakeNeedleTask(*tokenizer_, hay, 2048, 4, /*seed=*/1);
  ASSERT_TRUE(task.ok()) << task.status();
  EXPECT_THAT(task->depths, testing::ElementsAre(0.125, 0.375, 0.625, 0.875));
  const std::string text = tokenizer_->Decode(task->haystack);
  for (size_t i = 0; i < 4; ++i) {
    const std::string line = tokenizer_->Decode(task->questions[i]) + tokenizer_->Decode(task->answers[i]);
    const size_t at = text.find(line);
    ASSERT_NE(at, std::string::npos) << line;
    EXPECT_NEAR(static_cast<double>(at) / static_cast<double>(text.size()), task->depths[i], 0.05);
    EXPECT_LE(task->haystack.size() + task->questions[i].size() + task->answers[i].size(), 2048u);
  }
  EXPECT_FALSE(MakeNeedleTask(*tokenizer_, hay, 256, 4, 1).ok());
  LocalKvStore store(model_->kv_geometry(), DataType::kF16, pool_);
  const auto scores = AskNeedles(*model_, store, *task, 256);
  ASSERT_TRUE(scores.ok()) << scores.status();
  ASSERT_EQ(scores->size(), 4u);
  for (const NeedleScore& score : *scores) {
    EXPECT_EQ(score.asked, 1);
    EXPECT_LT(score.log_likelihood, 0);
  }
}

TEST(DivergenceHistogramTest, QuantilesAreWithinABin) {
  DivergenceHistogram histogram;
  for (int i = 1; i <= 1000; ++i) histogram.Add(i * 1e-4);
  EXPECT_NEAR(histogram.Quantile(0.5), 0.05, 0.05 * 0.025);
  EXPECT_NEAR(histogram.Quantile(0.99), 0.099, 0.099 * 0.025);
  DivergenceHistogram none;
  EXPECT_EQ(none.Quantile(0.99), 0);
  none.Add(0);
  EXPECT_EQ(none.Quantile(0.99), 0);
}

TEST(EvalStateTest, GoesOnFromWhatWasSavedAndRefusesAnotherRun) {
  const std::string path = testing::TempDir() + "/kvtide_eval_state_" + std::to_string(getpid()) + ".json";
  std::filesystem::remove(path);
  PredictionScore score;
  score.predictions = 10;
  score.loss = 12.345678901234567;
  score.divergence = 0.1;
  score.same_top = 9;
  score.stored_bytes = 1 << 20;
  score.stored_tokens = 11;
  score.divergences.Add(0.01);
  {
    auto state = EvalState::Open(path, "this run");
    ASSERT_TRUE(state.ok()) << state.status();
    state->Put("q8_0/turbo4", 3, score);
    ASSERT_TRUE(state->Save().ok());
  }
  const auto state = EvalState::Open(path, "this run");
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_FALSE(state->Has("q8_0/turbo4", 2));
  ASSERT_TRUE(state->Has("q8_0/turbo4", 3));
  const PredictionScore& read = state->Get("q8_0/turbo4", 3);
  EXPECT_EQ(read.loss, score.loss);
  EXPECT_EQ(read.same_top, 9);
  EXPECT_EQ(read.divergences.bins(), score.divergences.bins());
  EXPECT_EQ(EvalState::Open(path, "another run").status().code(), absl::StatusCode::kFailedPrecondition);
  std::ofstream(path) << "{\"run\": 1}";
  EXPECT_EQ(EvalState::Open(path, "this run").status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtide::cli
