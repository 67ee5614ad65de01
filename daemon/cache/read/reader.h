// Attention and reading: snapshots are taken under the mutex; everything else is done without it. Attention
// plans once for all layers of a group and every step in which no table changes, lets every tier's backend
// attend over its own blocks, and merges the states.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "daemon/cache/call/sequence_calls.h"
#include "daemon/cache/move/mover.h"
#include "daemon/cache/read/attend_plans.h"
#include "daemon/cache/read/reading.h"
#include "daemon/cache/sequence/cache_core.h"
#include "daemon/cache/sequence/side_by_side.h"
#include "daemon/cache/write/write_batch.h"

namespace kvtide {

class Reader {
 public:
  Reader(CacheCore& core, Mover& mover);

  // The sequences of a call's items; an error if one is unknown or they are of several models.
  absl::StatusOr<std::vector<SequencePtr>> FindSequences(const AttendCall& call) const;
  // Everything that can be said of a call without looking at tables or values; with `append` its new tokens
  // too.
  absl::Status CheckCall(const AttendCall& call, const ModelSpec& model, bool append) const;
  // The values of a call that has passed CheckCall; sets the hashes of what `append`, which may be null,
  // writes of its items.
  absl::Status CheckValues(const AttendCall& call, const ModelSpec& model, WriteBatch* append) const;
  // What an item sees instead of its sequence as it is now.
  struct Held {
    const TableSnapshot* table = nullptr;
    int64_t tokens = 0;
  };
  // Checks values while the backends compute. `append`, which may be null, is what the call has begun to
  // append: its items see the new tokens, which are written here if they are not yet. `held`: by item, or
  // empty.
  absl::Status Attend(CacheLock& lock, const AttendCall& call, const std::vector<SequencePtr>& sequences,
                      WriteBatch* append, std::span<const Held> held = {});

  absl::Status ReadTokens(const ReadCall& call);

  // Of plans that wait for the next layer or step, in devices' memory.
  size_t plan_bytes() const { return plans_.bytes(); }

 private:
  struct Batch;
  struct Item;
  struct PartState;

  absl::Status CheckItem(const AttendRequest& item, int layer, const LayerGroupSpec& group,
                         bool append) const;
  struct Wanted;
  absl::StatusOr<std::vector<Wanted>> TryAttend(CacheLock& lock, Batch& batch);
  absl::StatusOr<std::vector<Wanted>> AttendNow(const Batch& batch, Reading& reading);
  absl::StatusOr<std::vector<Wanted>> TryRead(const ReadCall& call, const CallContext& context);
  absl::Status TakeSnapshots(CacheState& state, Batch& batch, Reading& reading) const;
  absl::Status FindVisible(const Batch& batch, Item& item) const;
  // Blocks [begin, end) of a table, wanted where a backend can work on them.
  struct Wanted {
    SequencePtr sequence;
    int group = 0;
    int64_t begin = 0, end = 0;
    std::vector<int> tiers;  // that they are to leave; none: those of I/O
  };
  bool HasFar(const TableSnapshot& snapshot, int64_t begin, int64_t end) const;
  // Which blocks in lower tiers that attend are to be brought home first.
  std::vector<Wanted> PickPromoted(Batch& batch, Reading& reading) const;
  // Then the items see the same where it lies now, by snapshots of `reading`.
  void BringHome(CacheLock& lock, Batch& batch, std::span<const Wanted> wanted, Reading& reading);
  // `round`: how often the call has done this already. `before_serial` is the same for all rounds.
  absl::Status BringIn(CacheLock& lock, std::span<const Wanted> wanted, int round, uint64_t* before_serial,
                       const CallContext& context);
  absl::Status CheckWork(const Batch& batch) const;
  absl::StatusOr<std::unique_ptr<CachedAttendPlan>> FindPlan(const Batch& batch);
  absl::StatusOr<std::unique_ptr<CachedAttendPlan>> MakePlan(const Batch& batch, AttendPlanKey key);
  absl::Status WriteApart(const Batch& batch, const CachedAttendPlan& plan) const;
  std::vector<size_t> MakeStates(const Batch& batch, const CachedAttendPlan& plan,
                                 std::vector<PartState>& states) const;
  absl::Status AttendParts(const Batch& batch, CachedAttendPlan& plan, std::vector<PartState>& states);
  absl::Status MergeParts(const Batch& batch, std::vector<PartState>& states) const;
  absl::Status CheckLogits(const Batch& batch, size_t index, const float* lse) const;

  struct LayerRows;
  absl::Status CheckRead(const ReadCall& call, const ModelSpec& model) const;
  absl::Status ReadLayer(const ReadCall& call, const CallContext& context, const LayerRows& layer,
                         const LayerSpec& spec) const;

  CacheCore& core_;
  Mover& mover_;
  SideBySide machines_;
  AttendPlans plans_;
};

}  // namespace kvtide
