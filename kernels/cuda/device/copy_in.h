// Copies from pinned memory of the host to the device by a kernel: some hundred KB are there before a copy
// engine has begun, and each byte crosses the bus once, however often the kernels behind read it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace kvtide::cuda {

// Both begin at multiples of 16 bytes.
cudaError_t LaunchCopyIn(const void* pinned, void* device, size_t bytes, cudaStream_t stream);

}  // namespace kvtide::cuda
