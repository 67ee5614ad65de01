// How far a model's predictions move when its keys and values are stored otherwise. One window of text runs
// through several stores in lockstep, chunk by chunk; every prediction is compared with that of the first
// store, so nothing larger than one chunk of logits is ever kept.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/engine/kv_store.h"
#include "clients/engine/llama_model.h"
#include "kernels/base/thread_pool.h"

namespace kvtide::cli {

// Counts of divergences in bins of 1/100 of a decade: quantiles within 1.2 %, and parts can be merged and
// saved.
class DivergenceHistogram {
 public:
  void Add(double divergence);
  void Merge(const DivergenceHistogram& other);
  // The value below which a share `q` of the divergences lies; 0 when there are none.
  double Quantile(double q) const;

  const std::map<int, int64_t>& bins() const { return bins_; }
  void AddBin(int bin, int64_t count) { bins_[bin] += count; }

 private:
  std::map<int, int64_t> bins_;
};

// Sums over predictions; windows merge by addition.
struct PredictionScore {
  int64_t predictions = 0;
  double loss = 0;        // negative log-likelihood of the text, nats
  double divergence = 0;  // Kullback-Leibler divergence from the first store's prediction, nats
  int64_t same_top = 0;   // most likely token equal to the first store's
  DivergenceHistogram divergences;
  int64_t stored_bytes = 0;  // of the sequences at their full length
  int64_t stored_tokens = 0;

  void Merge(const PredictionScore& other);
  double Perplexity() const;
  double MeanDivergence() const { return divergence / static_cast<double>(predictions); }
  double TopAgreement() const { return static_cast<double>(same_top) / static_cast<double>(predictions); }
};

struct WindowRun {
  std::span<const int32_t> tokens;       // predictions are made for all but the first
  int chunk = 64;                        // tokens that the engine hands over at a time
  std::vector<engine::KvStore*> stores;  // the first one is the yardstick
  // Tokens of the window that every store has; also the place to stop a run: a status other than OK ends it.
  std::function<absl::Status(int)> progress;
  // Called with the finished sequence of each store, before it is closed.
  std::function<absl::Status(size_t store, engine::SequenceId, PredictionScore*)> finished;
};

// One score per store, in their order.
absl::StatusOr<std::vector<PredictionScore>> ScoreWindow(const engine::LlamaModel& model, ThreadPool& pool,
                                                         const WindowRun& run);

}  // namespace kvtide::cli
