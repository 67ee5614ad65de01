#include "clients/cli/eval/eval_score.h"

#include <algorithm>
#include <cmath>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "clients/engine/sampler.h"
#include "clients/engine/vector_math.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

constexpr int kBinsPerDecade = 100;
// Divergences below 1e-9 nats are rounding.
constexpr double kSmallestDivergence = 1e-9;
// Rows of logits at a time: 64 x 128K x 4 bytes = 32 MiB for a large vocabulary.
constexpr int kLogitRows = 64;

struct RowScore {
  double loss = 0;
  double lse = 0;
  double divergence = 0;
  int32_t top = 0;
};

// Compares the chunk's predictions; hidden[s] holds [rows][hidden_size] of store s, next[i] is the token
// after row i.
void ScoreChunk(const engine::LlamaModel& model, ThreadPool& pool,
                const std::vector<std::vector<float>>& hidden, std::span<const int32_t> next,
                std::vector<PredictionScore>* scores) {
  const size_t vocab = model.config().vocab_size, width = model.config().hidden_size;
  const int rows = static_cast<int>(next.size());
  std::vector<float> base(kLogitRows * vocab), other(kLogitRows * vocab);
  for (int first = 0; first < rows; first += kLogitRows) {
    const int n = std::min(kLogitRows, rows - first);
    std::vector<RowScore> base_rows(n), these(n);
    for (size_t s = 0; s < hidden.size(); ++s) {
      std::vector<float>& logits = s == 0 ? base : other;
      model.Logits(hidden[s].data() + first * width, n, logits.data());
      pool.ParallelFor(n, [&](int64_t i) {
        const float* row = logits.data() + i * vocab;
        const float* base_row = base.data() + i * vocab;
        RowScore& score = these[i];
        score.lse = engine::LogSumExp(row, vocab);
        score.loss = score.lse - row[next[first + i]];
        score.top = engine::ArgMax({row, vocab});
        score.divergence =
            s == 0 ? 0 : engine::KlDivergence(base_row, base_rows[i].lse, row, score.lse, vocab);
      });
      if (s == 0) base_rows = these;
      PredictionScore& sum = (*scores)[s];
      for (int i = 0; i < n; ++i) {
        ++sum.predictions;
        sum.loss += these[i].loss;
        sum.divergence += these[i].divergence;
        sum.same_top += these[i].top == base_rows[i].top;
        sum.divergences.Add(these[i].divergence);
      }
    }
  }
}

}  // namespace

void DivergenceHistogram::Add(double divergence) {
  const double value = std::max(divergence, kSmallestDivergence);
  ++bins_[static_cast<int>(std::floor(std::log10(value) * kBinsPerDecade))];
}

void DivergenceHistogram::Merge(const DivergenceHistogram& other) {
  for (const auto& [bin, count] : other.bins_) bins_[bin] += count;
}

double DivergenceHistogram::Quantile(double q) const {
  int64_t total = 0;
  for (const auto& [bin, count] : bins_) total += count;
  int64_t below = 0;
  for (const auto& [bin, count] : bins_) {
    below += count;
    if (static_cast<double>(below) < q * static_cast<double>(total)) continue;
    const double value = std::pow(10.0, (bin + 0.5) / kBinsPerDecade);
    return value <= 1.02 * kSmallestDivergence ? 0 : value;
  }
  return 0;
}

void PredictionScore::Merge(const PredictionScore& other) {
  predictions += other.predictions;
  loss += other.loss;
  divergence += other.divergence;
  same_top += other.same_top;
  divergences.Merge(other.divergences);
  stored_bytes += other.stored_bytes;
  stored_tokens += other.stored_tokens;
}

double PredictionScore::Perplexity() const { return std::exp(loss / static_cast<double>(predictions)); }

absl::StatusOr<std::vector<PredictionScore>> ScoreWindow(const engine::LlamaModel& model, ThreadPool& pool,
                                                         const WindowRun& run) {
  const int total = static_cast<int>(run.tokens.size());
  if (total < 2) return absl::InvalidArgumentError("a window needs two tokens");
  std::vector<engine::SequenceId> sequences;
  const auto close = absl::MakeCleanup([&] {
    for (size_t s = 0; s < sequences.size(); ++s) run.stores[s]->Close(sequences[s]).IgnoreError();
  });
  for (engine::KvStore* store : run.stores) {
    KVTIDE_ASSIGN_OR_RETURN(const engine::SequenceId sequence, store->CreateSequence());
    sequences.push_back(sequence);
  }
  std::vector<PredictionScore> scores(run.stores.size());
  std::vector<std::vector<float>> hidden(run.stores.size());
  for (int at = 0; at < total; at += run.chunk) {
    const int n = std::min(run.chunk, total - at);
    for (size_t s = 0; s < run.stores.size(); ++s) {
      KVTIDE_RETURN_IF_ERROR(
          model.Forward(*run.stores[s], sequences[s], at, run.tokens.subspan(at, n), &hidden[s]));
    }
    const int predicted = std::min(n, total - 1 - at);
    if (predicted > 0) ScoreChunk(model, pool, hidden, run.tokens.subspan(at + 1, predicted), &scores);
    if (run.progress) KVTIDE_RETURN_IF_ERROR(run.progress(at + n));
  }
  for (size_t s = 0; s < run.stores.size(); ++s) {
    if (!std::isfinite(scores[s].loss)) {
      return absl::InternalError(absl::StrCat("the loss of store ", s, " is not a finite number"));
    }
    if (run.finished) KVTIDE_RETURN_IF_ERROR(run.finished(s, sequences[s], &scores[s]));
  }
  return scores;
}

}  // namespace kvtide::cli
