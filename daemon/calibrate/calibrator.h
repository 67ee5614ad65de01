// Calibrations from traffic of all models: watches the cache's calls and has one thread, of the lowest
// priority, that adds up what was sampled and makes profiles.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/call/traffic.h"
#include "daemon/calibrate/gathering.h"
#include "kernels/base/mutex.h"

namespace kvtide {

struct CalibratorOptions {
  // Who is calibrated: nobody; models that are asked for; all from their registration on.
  enum class Models { kNever, kAsked, kAll } models = Models::kAsked;
  int64_t memory_bytes = int64_t{64} << 20;  // of all calibrations together
};

// Of all calibrations since the start, those that are over included.
struct CalibratorStats {
  int64_t gathering = 0, making = 0, ready = 0, refused = 0;  // now
  int64_t memory_bytes = 0;                                   // now
  absl::Duration observed, spent, making_time;
};

// Thread-safe. Outlives the cache that it watches.
class Calibrator : public TrafficWatcher {
 public:
  explicit Calibrator(const CalibratorOptions& options) : options_(options) {}
  ~Calibrator() override;

  const CalibratorOptions& options() const { return options_; }
  // Of all calibrations together; 0 where there are none.
  int64_t memory_limit() const {
    return options_.models == CalibratorOptions::Models::kNever ? 0 : options_.memory_bytes;
  }

  bool active() const override { return active_.load(std::memory_order_relaxed); }
  int64_t Wants(ModelId family, int layer, absl::Duration took) override;
  void See(ModelId family, int layer, std::span<const TrafficRows> rows, int64_t tokens) override;

  // What is known of a model's RoPE, by layer; empty = nothing new.
  void NoteRopes(ModelId family, std::vector<Rope> ropes);
  std::vector<Rope> RopesOf(ModelId family) const;
  bool Has(ModelId family) const;

  // Begins anew where there was one. InvalidArgument as CompletePlan; FailedPrecondition where nobody is
  // calibrated; ResourceExhausted without the memory, before any of it is taken.
  absl::Status Start(CalibrationPlan plan);
  // NotFound if there is none.
  absl::Status Stop(ModelId family);
  // The model is no more.
  void Forget(ModelId family);
  std::vector<CalibrationStatus> List() const;
  absl::StatusOr<CalibrationStatus> StatusOf(ModelId family) const;
  // As Gathering::Export; NotFound if there is none.
  absl::StatusOr<ModelSpec> Export(ModelId family) const;
  // RoPE of the calibration's model by layer; empty = not known.
  absl::StatusOr<std::vector<Rope>> PlannedRopes(ModelId family) const;
  void NoteInstalled(ModelId family);
  CalibratorStats Stats() const;

 private:
  using GatheringPtr = std::shared_ptr<Gathering>;
  absl::StatusOr<GatheringPtr> Find(ModelId family) const;
  void Remove(ModelId family) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Work();

  const CalibratorOptions options_;
  std::atomic<bool> active_{false}, stopping_{false};
  mutable Mutex mutex_;
  CondVar wake_;
  bool work_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<ModelId, GatheringPtr> gatherings_ ABSL_GUARDED_BY(mutex_);
  std::map<ModelId, std::vector<Rope>> ropes_ ABSL_GUARDED_BY(mutex_);
  absl::Duration past_observed_ ABSL_GUARDED_BY(mutex_), past_spent_ ABSL_GUARDED_BY(mutex_),
      past_making_ ABSL_GUARDED_BY(mutex_);
  std::thread worker_ ABSL_GUARDED_BY(mutex_);  // from the first calibration on
};

}  // namespace kvtide
