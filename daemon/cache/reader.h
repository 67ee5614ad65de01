// Attention: plan and pin under the mutex, let every tier's backend attend over its own blocks without it,
// merge the states.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "daemon/cache/cache_core.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/cache/side_by_side.h"

namespace kvtide {

class Reader {
 public:
  explicit Reader(CacheCore& core) : core_(core) {}

  // The sequences of a call's items; an error if one is unknown or they are of several models.
  absl::StatusOr<std::vector<SequencePtr>> FindSequences(const AttendCall& call) const;
  // Everything that can be said of a call without looking at tables; with `append` its new tokens too.
  absl::Status CheckCall(const AttendCall& call, const ModelSpec& model, bool append) const;
  // `own_writer`: the call itself is the writer of the sequences that it has appended to.
  absl::Status Attend(const AttendCall& call, const std::vector<SequencePtr>& sequences, bool own_writer);

 private:
  class Reading;
  struct TierPart;
  struct ItemPlan;

  absl::Status CheckItem(const AttendRequest& item, int layer, const LayerGroupSpec& group,
                         bool append) const;
  absl::Status PlanItem(CacheState& state, const AttendCall& call, const AttendRequest& item,
                        const SequencePtr& sequence, bool own_writer, ItemPlan* plan, Reading* reading);
  absl::Status AttendTiers(const AttendArgs& args, std::vector<std::vector<AttendItem>>& work);
  static void MergeTiers(const AttendCall& call, const LayerGroupSpec& group, std::vector<ItemPlan>& plans);

  CacheCore& core_;
  SideBySide machines_;
};

}  // namespace kvtide
