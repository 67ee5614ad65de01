// Attention and reading: snapshots are taken under the mutex; everything else is done without it. Attention
// plans once for all layers of a group and every step in which no table changes, lets every tier's backend
// attend over its own blocks, and merges the states.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "daemon/cache/attend_plans.h"
#include "daemon/cache/cache_core.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/cache/reading.h"
#include "daemon/cache/side_by_side.h"

namespace kvtide {

class Reader {
 public:
  explicit Reader(CacheCore& core);

  // The sequences of a call's items; an error if one is unknown or they are of several models.
  absl::StatusOr<std::vector<SequencePtr>> FindSequences(const AttendCall& call) const;
  // Everything that can be said of a call without looking at tables; with `append` its new tokens too.
  absl::Status CheckCall(const AttendCall& call, const ModelSpec& model, bool append) const;
  // `own_writer`: the call itself is the writer of the sequences that it has appended to.
  absl::Status Attend(const AttendCall& call, const std::vector<SequencePtr>& sequences, bool own_writer);

  absl::Status ReadTokens(const ReadCall& call);

 private:
  struct Batch;
  struct Item;
  struct PartState;

  absl::Status CheckItem(const AttendRequest& item, int layer, const LayerGroupSpec& group,
                         bool append) const;
  absl::Status TakeSnapshots(CacheState& state, Batch& batch, Reading& reading) const;
  absl::Status FindVisible(const Batch& batch, Item& item) const;
  absl::Status CheckWork(const Batch& batch) const;
  absl::StatusOr<std::unique_ptr<CachedAttendPlan>> FindPlan(const Batch& batch);
  absl::StatusOr<std::unique_ptr<CachedAttendPlan>> MakePlan(const Batch& batch, AttendPlanKey key);
  absl::Status AttendParts(const Batch& batch, CachedAttendPlan& plan, std::vector<PartState>& states);
  absl::Status MergeParts(const Batch& batch, std::vector<PartState>& states) const;
  absl::Status CheckLogits(const Batch& batch, size_t index, const float* lse) const;

  struct LayerRows;
  absl::Status CheckRead(const ReadCall& call, const ModelSpec& model) const;
  absl::Status ReadLayer(const ReadCall& call, const CallContext& context, const LayerRows& layer,
                         const LayerSpec& spec) const;

  CacheCore& core_;
  SideBySide machines_;
  AttendPlans plans_;
};

}  // namespace kvtide
