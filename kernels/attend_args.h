// The check of attention's arguments with which every backend starts, and the arithmetic of positions:
// both bound what comes from outside, so that no sum or product of it overflows afterwards.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace kvtide {

// Tokens and queries stand at positions 0 .. kMostPosition - 1.
constexpr int64_t kMostPosition = int64_t{1} << 48;
// Rows of an item: queries x query heads.
constexpr int64_t kMostRows = int64_t{1} << 30;
// Soft-caps beyond change no logit that f32 can tell from the uncapped one.
constexpr float kMostSoftcap = 1e30f;

// What the layers of a plan are checked against; a backend's plan keeps it.
struct AttendShape {
  GroupShape group;  // of all runs; all 0 if there are no items
  int heads = 0;
  std::vector<int> queries;  // of each item
};

// InvalidArgument that names the item and the run of what does not fit together.
absl::StatusOr<AttendShape> CheckAttendPlan(const AttendPlanArgs& args);
absl::Status CheckAttendLayer(const AttendLayerArgs& args, const AttendShape& shape);
// Steps of a layer's call. The second is for backends that cannot queue the rows before the attention.
absl::Status RunMeanwhile(const AttendLayerArgs& args);
absl::Status AppendFirst(Backend& backend, const AttendLayerArgs& args);
// Plan and layer at once. The shape's group is that of all runs; all 0 if there are no items.
absl::StatusOr<AttendShape> CheckAttendArgs(const AttendArgs& args);

// Blocks that a run's tokens take.
inline int64_t BlocksOf(const BlockRun& run) { return (run.tokens + kBlockTokens - 1) / kBlockTokens; }

// Positions begin <= p < end; empty if begin >= end.
struct PositionRange {
  int64_t begin = 0, end = 0;
};

// What a query at `position` sees, whatever the window (0 = all).
inline PositionRange VisiblePositions(int64_t position, bool causal, int64_t window) {
  return {window > 0 ? std::max<int64_t>(0, position - std::min(window, kMostPosition) + 1) : 0,
          causal ? position + 1 : kMostPosition};
}

}  // namespace kvtide
