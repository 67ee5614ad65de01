// Backend::PlanAttend and AttendLayer on a GPU. A plan says which kernels compute which queries: batches, one
// after the other, of items with few rows (attend/) or with many (prefill/). Most plans are one batch of few
// rows whose tables lie on the device; what else there is, is planned again for each layer: pages that are
// converted first, and work so long that it is cut into batches of bounded time, between which a
// call can be stopped. Prefills are planned with the first layer.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attend_args.h"
#include "kernels/backend.h"
#include "kernels/cuda/attend/decode_tables.h"
#include "kernels/cuda/attend/environment.h"
#include "kernels/cuda/attend/layer_tensors.h"
#include "kernels/cuda/device/workspace.h"
#include "kernels/cuda/prefill/prefill_call.h"

namespace kvtide::cuda {

class LayerPlan : public AttendPlan {
 public:
  // `previous` may be null; its memory is used again. The environment outlives the plan.
  static absl::StatusOr<std::unique_ptr<LayerPlan>> Make(const AttendPlanArgs& args,
                                                         const AttendEnvironment& environment,
                                                         std::unique_ptr<LayerPlan> previous);
  // Whether Attend can queue `append` and call `meanwhile` itself: pieces of one layout, before a plan whose
  // first batch is on the device. The caller does both before, for other plans.
  bool QueuesAppend(const AttendLayerArgs& args) const;
  // Pieces to append are checked. Internal, with item, query and head, where logits leave f32.
  // Waits for the end of the work unless it fails: then the workspace's owner does (Workspace::Abandon).
  absl::Status Attend(const AttendLayerArgs& args, const AttendEnvironment& environment,
                      Workspace& workspace);

  // What the plan has on the device, and what it and those before it have sent there.
  size_t device_bytes() const override { return tables_.device_bytes(); }
  size_t sent_bytes() const { return tables_.sent_bytes(); }

 private:
  // Queries of some items that are computed together.
  struct Batch {
    enum Kind { kPlanned, kFewRows, kManyRows } kind = kPlanned;
    std::vector<ItemSlice> slices;
    std::unique_ptr<PrefillPlan> prefill;  // of kManyRows, once a layer was attended
  };
  struct KeptItem {
    std::vector<std::byte*> blocks;  // of all runs
    std::vector<BlockRun> runs;      // only where batches are planned again
    std::vector<PositionRange> positions;
    int64_t first_query_position = 0;
  };

  void Keep(const AttendPlanArgs& args);
  void Cut(const AttendPlanArgs& args, const AttendEnvironment& environment);
  bool SeesAToken(size_t item, int query) const;
  // By the kernels for few rows, whatever the number of rows: their logits are exact and their overflow is
  // seen.
  absl::Status AttendWithCare(const Batch& batch, const AttendLayerArgs& args,
                              const AttendEnvironment& environment, Workspace& workspace);
  AttendPlanArgs PlanAgain(const Batch& batch, std::vector<PlanItem>* items) const;
  absl::Status AttendBatch(Batch& batch, const AttendLayerArgs& args, const AttendEnvironment& environment,
                           Workspace& workspace);

  // Of a plan made of slices of another one's items: which they are.
  std::vector<ItemSlice> origin_;
  AttendShape shape_;
  bool causal_ = true;
  int64_t window_ = 0;
  std::vector<KeptItem> items_;
  std::vector<Batch> batches_;
  DecodeTables tables_;  // of the batch that is kPlanned, else of the one at hand
};

}  // namespace kvtide::cuda
