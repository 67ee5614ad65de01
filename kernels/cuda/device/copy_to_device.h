// Copies that kernels on any stream may read at once. cudaMemcpy alone returns when pageable host memory has
// been read, or a copy on the device been queued: what it writes may still be on its way, and streams that do
// not wait for the default stream (Stream) would read what was there before.
#pragma once

#include <cstddef>

#include "kernels/cuda/device/cuda_error.h"

namespace kvtide::cuda {

// From host or device memory.
inline absl::Status CopyToDevice(void* to, const void* from, size_t bytes) {
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(cudaStreamLegacy));
  return absl::OkStatus();
}

}  // namespace kvtide::cuda
