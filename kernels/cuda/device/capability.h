// What differs between generations of GPUs, as functions of the compute capability (x.y is 10 * x + y here):
// shared memory of a CTA decides how many warps and ring slots a kernel has, so a kernel exists once for each
// size that the build's architectures have. Host code picks by the code image that the device runs, device
// code by __CUDA_ARCH__; both ask here.
#pragma once

#include "kernels/base/host_device.h"

namespace kvtide::cuda {

inline constexpr int kOldestCapability = 80;

// Bytes of shared memory that a CTA may use, on every device that runs code of this capability.
KVTIDE_HD constexpr int SharedLimitOf(int capability) {
  switch (capability) {
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 * 1024;
    default:
      return 227 * 1024;  // 9.0, 10.x, 11.0
  }
}
inline constexpr int kSharedLimits[] = {227 * 1024, 163 * 1024, 99 * 1024};

// Bulk copies, mbarriers with expected bytes and programmatic dependent launch begin with 9.0.
KVTIDE_HD constexpr bool HasBulkCopies(int capability) { return capability >= 90; }

// Matrix products of four warps together exist on 9.x alone.
KVTIDE_HD constexpr bool HasWarpgroups(int capability) { return capability / 10 == 9; }

#ifdef __CUDA_ARCH__
inline constexpr int kThisCapability = __CUDA_ARCH__ / 10;
#else
inline constexpr int kThisCapability = 90;  // host pass: never runs
#endif

}  // namespace kvtide::cuda
