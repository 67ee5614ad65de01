// One calibration from traffic: takes a sample of the rows that a model's calls bring, adds them up
// (KeySums), holds the last ones back, makes a profile and measures it on these.
//
// What a call pays is a look at two numbers, and for those that are sampled the copy of a few rows, never
// more of them than a share of the call's own time copies. All else is the worker's. Both are paid from one
// account, into which every call puts a share of the time that it took: when it is empty, nothing is sampled.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/cache/call/cache_stats.h"
#include "daemon/cache/call/model.h"
#include "daemon/cache/call/traffic.h"
#include "kernels/base/mutex.h"
#include "kernels/base/thread_pool.h"
#include "kernels/format/key_sums.h"

namespace kvtide {

struct CalibrationPlan {
  ModelId family = 0;
  std::string tenant;
  ModelSpec model;          // its profiles do not matter
  std::vector<Rope> ropes;  // by model layer; empty = not known
  int64_t tokens = 16384;   // of each layer, those held back included
  int64_t held_back = 0;    // 0 = an eighth, at most 1024
  bool after_rope = false;  // keys as they are stored; always so where RoPE is not known
  double share = 0.01;      // of the time of calls that may be spent; 1 = every row is taken
};

// Fills in what is 0. InvalidArgument names the field.
absl::Status CompletePlan(CalibrationPlan* plan);

enum class CalibrationState { kGathering, kMaking, kReady, kRefused };

struct CalibrationStatus {
  std::string model, tenant;
  CalibrationState state = CalibrationState::kGathering;
  int64_t wanted_tokens = 0, wanted_held_back = 0;
  int64_t tokens = 0,
          most_tokens = 0;  // of the layer with the fewest, and the most; those of keys or queries
  int layers = 0, whole_layers = 0;
  int64_t query_rows = 0, left_out_rows = 0;
  int64_t waiting_tokens = 0;  // sampled, and not yet added up
  bool after_rope = false;
  int64_t context = 0;  // one more than the last position of a query
  absl::Duration observed, spent, making;
  double share = 0;
  int64_t memory_bytes = 0;
  std::vector<KeyTypeError> errors;
  std::string problem;
  bool installed = false;
};

// Thread-safe; Work is for one thread.
class Gathering {
 public:
  explicit Gathering(CalibrationPlan plan);  // a complete one

  // The most that a gathering takes in memory; +infinity rather than an overflow.
  static double Bytes(const CalibrationPlan& plan);

  const CalibrationPlan& plan() const { return plan_; }
  int64_t memory_bytes() const;

  // As TrafficWatcher.
  int64_t Wants(int layer, absl::Duration took);
  // True: there is work.
  bool See(int layer, std::span<const TrafficRows> rows, int64_t tokens);

  // Adds up what was seen; makes the profile when all is there. False: there was nothing to do. `stop` ends
  // it between batches.
  bool Work(const std::atomic<bool>& stop);

  // More rows are wanted.
  bool gathers() const;
  CalibrationStatus Status() const;
  // The model with the profile. FailedPrecondition until it is there.
  absl::StatusOr<ModelSpec> Export() const;
  void NoteInstalled() { installed_ = true; }

 private:
  // Rows of one kind that follow each other.
  struct Run {
    bool keys = false;
    int64_t position = 0;
    int tokens = 0;
    DataType type = DataType::kF32;
    size_t at = 0;  // in the batch's bytes
  };
  struct Batch {
    int layer = 0;
    std::vector<Run> runs;
    std::vector<std::byte> bytes;
    int64_t tokens = 0;
    double paid_nanos = 0;  // what the account was charged
  };
  // Tokens of a layer whose rows were taken, and added up.
  struct LayerCount {
    std::atomic<int64_t> keys{0}, queries{0};              // taken
    std::atomic<int64_t> added_keys{0}, added_queries{0};  // by Work
  };

  const LayerGroupSpec& GroupOf(int layer) const {
    return plan_.model.groups[static_cast<size_t>(plan_.model.layers[static_cast<size_t>(layer)].group)];
  }
  // Up to `room`, and not far beyond what the layer with the fewest has, so that all fill together.
  int64_t Room(int64_t taken, int64_t fewest) const;
  void Add(const Batch& batch);
  bool Whole() const;
  void Make();

  CalibrationPlan plan_;
  std::vector<LayerCount> layers_;
  std::atomic<int64_t> fewest_keys_{0}, fewest_queries_{0};
  std::atomic<double> account_nanos_{0};   // may be spent
  std::atomic<double> nanos_per_product_;  // of the sums, as measured
  std::atomic<int64_t> observed_nanos_{0}, spent_nanos_{0}, making_nanos_{0};
  std::atomic<int64_t> query_rows_{0}, left_out_rows_{0}, waiting_tokens_{0}, context_{0};
  std::atomic<bool> installed_{false};

  ThreadPool pool_{1};
  std::vector<KeySums> sums_;  // by layer group; Work's, empty once the profile is there

  mutable Mutex mutex_;
  std::deque<Batch> queue_ ABSL_GUARDED_BY(mutex_);
  size_t queued_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  CalibrationState state_ ABSL_GUARDED_BY(mutex_) = CalibrationState::kGathering;
  std::vector<KeyTypeError> errors_ ABSL_GUARDED_BY(mutex_);
  std::string problem_ ABSL_GUARDED_BY(mutex_);
  std::vector<Profile> profiles_ ABSL_GUARDED_BY(mutex_);  // by layer group
};

}  // namespace kvtide
