// Backend::Attend on a GPU: turns items, runs and rows into units and launches, runs them and brings the
// result back. Runs whose pair and head dims have a kernel are read where they lie; the blocks of all others
// are converted to f16 pages in scratch memory first, as many at a time as fit.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/rotations.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

struct AttendEnvironment {
  int processors = 0;
  size_t scratch_bytes = 0;
  Rotations* rotations = nullptr;
  int most_decode_rows = 256;  // items with more rows per KV head are prefill (prefill_call.h)
  // Of the code that the device runs (device_image.h): shared memory of a CTA, 0 = the most that this build
  // counts on; prefill kernels for 9.x only; launches that overlap, from 9.0 on.
  int shared_limit = 0;
  bool warpgroups = true, dependent_launches = true;
  // Recorded around the kernels of a call if not null: benchmarks measure with them.
  cudaEvent_t begin = nullptr, end = nullptr;
};

// Once for a device, before the first call.
absl::Status PrepareAttendKernels(const DeviceImage& image);
absl::Status AttendCall(const AttendArgs& args, const AttendEnvironment& environment, Workspace& workspace);

}  // namespace kvtide::cuda
