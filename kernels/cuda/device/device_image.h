// Which of this build's code a GPU runs: checked once for a device, before anything is launched there.
#pragma once

#include "absl/status/statusor.h"

namespace kvtide::cuda {

struct DeviceImage {
  int capability = 0;        // of the device, 90 for 9.0
  int image_capability = 0;  // of the code that runs on it: what __CUDA_ARCH__ was
  int shared_limit = 0;      // bytes of shared memory of a CTA that this code counts on (capability.h)
};

// FailedPrecondition when the GPU is too old or the build holds no code for it; the message says what to
// build.
absl::StatusOr<DeviceImage> FindDeviceImage(int device);

}  // namespace kvtide::cuda
