// Attention for items with many query rows: the visible blocks of a KV head are decoded once into f16 tiles
// in scratch memory, as many as fit, and read by all its rows with tensor-core speed (prefill_kernel.cuh).
// Longer contexts take several rounds of decoding and attending, whose states are merged as they come:
// scratch memory, the partial states included, stays within AttendEnvironment::scratch_bytes unless one tile
// of rows over one page needs more.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/attend/environment.h"
#include "kernels/cuda/attend/layer_tensors.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/profile_store.h"
#include "kernels/cuda/device/workspace.h"
#include "kernels/cuda/prefill/prefill_rounds.h"

namespace kvtide::cuda {

// Whether an item is computed here: it has more rows per KV head than `most_decode_rows`, and its head dims
// have a kernel that the device's shared memory holds.
bool IsPrefill(const PlanItem& item, const GroupShape& shape, int heads,
               const AttendEnvironment& environment);

absl::Status PreparePrefillKernels(const DeviceImage& image);

// Transforms of calibrated keys on the device, by profile; held by a plan.
using PrefillTransforms = std::map<const Profile*, std::shared_ptr<const DeviceProfile>>;

// A batch, which is checked, planned for all layers of its group.
class PrefillPlan {
 public:
  // All items are of the given shape. Shape, environment and what `items` point to outlive the plan.
  PrefillPlan(std::vector<PlanItem> items, const AttendPlanArgs& batch, const GroupShape& shape,
              const AttendEnvironment& environment);
  PrefillPlan(const PrefillPlan&) = delete;
  PrefillPlan& operator=(const PrefillPlan&) = delete;

  // One layer. Queues and waits: between rounds it looks at the cancellation. Results are in the tensors'
  // memory, not yet fetched.
  absl::Status Attend(const AttendLayerArgs& args, LayerTensors& tensors, Workspace& workspace);

 private:
  const std::vector<PlanItem> items_;
  AttendPlanArgs batch_;
  const GroupShape& shape_;
  const AttendEnvironment& environment_;
  PrefillRounds rounds_;
  PrefillTransforms transforms_;
};

}  // namespace kvtide::cuda
