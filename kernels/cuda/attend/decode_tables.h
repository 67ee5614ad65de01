// Attention of few query rows (attend_kernel.cuh): what the kernels of a batch of items read, made once and
// used for any layer of the items' group. Runs whose pair and head dims have a kernel are read where they
// lie; the blocks of all others are converted to f16 pages in scratch memory first, as many at a time as fit:
// that is planned anew for each layer. Not thread-safe.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/attend/attend_launch.h"
#include "kernels/cuda/attend/environment.h"
#include "kernels/cuda/attend/layer_tensors.h"
#include "kernels/cuda/attend/visible_pages.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/profile_store.h"
#include "kernels/cuda/device/table_memory.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

// Once for a device, before the first call.
absl::Status PrepareAttendKernels(const DeviceImage& image);

// Whether a run is read where it lies.
bool HasAttendKernel(const BlockLayout& layout, int shared_limit);

// The rows of a unit for items of up to `queries` queries of `group` heads; 0 if the head dims have no
// kernel.
int UnitRows(const GroupShape& shape, int64_t queries, int group, int shared_limit);

class DecodeTables {
 public:
  // Conversions of a layer, by way of a workspace's scratch memory.
  struct Convert {
    int layer = 0;
    Workspace* workspace = nullptr;
  };
  // Plans a batch, which is checked; all runs have the shape. Without `convert` all must have kernels. What
  // was planned before is forgotten, its memory used again.
  absl::Status Make(const AttendPlanArgs& batch, const GroupShape& shape,
                    const AttendEnvironment& environment, std::optional<Convert> convert);
  struct Way {
    bool careful = false;  // logits may leave f32; a row of which no state is a number is then found too
    // What the stream has got last is a kernel that lets the next one start and writes rows into pages.
    bool after_rows = false;
  };
  // Queues the kernels of a layer, and before them what the device does not have yet. The tensors are placed.
  absl::Status Launch(const AttendLayerArgs& args, const LayerTensors& tensors, Way way,
                      const AttendEnvironment& environment, Workspace& workspace);
  // After an error: what the device has is in doubt.
  void Forget();

  size_t device_bytes() const { return memory_.device_bytes(); }
  size_t sent_bytes() const { return memory_.sent_bytes(); }

 private:
  struct UnitRef {
    size_t launch, unit;
    Rotation v_rotation;
  };
  struct GroupPlan {
    CombineGroup group;
    std::vector<UnitRef> refs;
  };
  // What runs of a pair have in common.
  struct RunKind {
    CachePair pair;
    bool levels = false;                   // calibrated keys that are coded after RoPE
    const AttendKernel* kernel = nullptr;  // null: pages are converted
    Rotation v_rotation;
    size_t launch = 0;
    size_t table_bytes = 0;  // of a calibrated KV head
  };
  // Means and gains of a run's keys, or the tables of calibrated ones, of layer 0 and KV head 0.
  struct RunProfile {
    const float *mean = nullptr, *gain = nullptr;
    const std::byte* tables = nullptr;
    size_t table_bytes = 0;  // of a KV head
  };
  struct ScratchTable {
    std::byte** table;
    size_t count;
  };

  const RunKind& KindOf(const BlockRun& run) const;
  absl::Status ChooseKernels(const AttendPlanArgs& batch);
  int TilesOf(const PlanItem& item) const { return (item.queries * group_ + tile_rows_ - 1) / tile_rows_; }
  size_t TableBound(const AttendPlanArgs& batch) const;
  absl::Status PlanItemUnits(const AttendPlanArgs& batch, const PlanItem& item, size_t first_query);
  absl::Status PlanRun(const AttendPlanArgs& batch, const PlanItem& item, const BlockRun& run,
                       size_t first_query, size_t first_group);
  absl::Status AddKind(const BlockRun& run);
  absl::Status ConvertRun(const AttendPlanArgs& batch, const PlanItem& item, const BlockRun& run,
                          PageRange all, size_t first_query, size_t first_group);
  template <class Offset>
  void AddUnits(const AttendPlanArgs& batch, const PlanItem& item, const BlockRun& run, size_t first_query,
                size_t first_group, PageRange range, std::byte* const* table, int64_t table_page,
                Offset offset, const RunProfile& profile, size_t launch, const Rotation& v_rotation);
  absl::Status PlaceScratch();
  void PlaceLaunches();
  void PlaceMerge();

  // Of the batch at hand.
  const AttendEnvironment* environment_ = nullptr;
  std::optional<Convert> convert_;
  GroupShape shape_;
  int heads_ = 0, group_ = 0, most_queries_ = 0;
  int page_dim_ = 0;         // head dim of converted pages
  int tile_rows_ = 0;        // query rows of a unit
  size_t record_bytes_ = 0;  // of a converted page
  int64_t pages_per_chunk_ = 1;
  const AttendKernel* converted_ = nullptr;
  std::vector<RunKind> kinds_;  // few
  std::vector<LaunchPlan> launches_;
  size_t converting_ = static_cast<size_t>(-1);  // the launch that takes further conversions
  size_t scratch_needed_ = 0;
  std::vector<ScratchTable> scratch_tables_;
  std::vector<GroupPlan> groups_;
  size_t partial_bytes_ = 0, query_bytes_ = 0;
  CombineParams merge_;

  TableMemory memory_;
  bool sent_ = false;
  std::vector<std::shared_ptr<const DeviceProfile>> profiles_;
};

}  // namespace kvtide::cuda
