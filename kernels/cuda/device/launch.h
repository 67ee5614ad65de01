// One kernel launch as a status.
#pragma once

#include "kernels/cuda/device/device.h"

namespace kvtide::cuda {

// `params` is the kernel's only argument. dependent: it may start while the kernel before it in the stream
// ends (programmatic dependent launch, compute capability 9.0 on). No CTAs: nothing to do.
inline absl::Status LaunchKernel(const void* function, size_t grid, int block, int shared, bool dependent,
                                 void* params, cudaStream_t stream, size_t grid_y = 1) {
  if (grid == 0 || grid_y == 0) return absl::OkStatus();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid), static_cast<unsigned>(grid_y));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (dependent) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  void* arguments[] = {params};
  return StatusOf(KVTIDE_CUDA_TRY(cudaLaunchKernelExC(&config, function, arguments)), "launch");
}

}  // namespace kvtide::cuda
