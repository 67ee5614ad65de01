// Values of queries and outputs between the caller's element type and f32, which the prefill kernels take and
// give.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/base/data_type.h"

namespace kvtide::cuda {

// `from` and `to` begin at multiples of 16 bytes; types are f16 or bf16.
cudaError_t LaunchWiden(const void* from, DataType type, float* to, size_t count, cudaStream_t stream);
// Rounded to nearest, ties to even.
cudaError_t LaunchNarrow(const float* from, void* to, DataType type, size_t count, cudaStream_t stream);

}  // namespace kvtide::cuda
