#include <algorithm>

#include "kernels/cuda/prefill/convert_rows.h"

namespace kvtide::cuda {
namespace {

constexpr int kThreads = 256;

// Four values a thread at a time; `count` is a multiple of 4, as head dims are.
template <bool kBf16>
__global__ void Widen(const uint2* from, float4* to, size_t count) {
  const size_t stride = static_cast<size_t>(gridDim.x) * kThreads;
  for (size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count / 4; i += stride) {
    const uint2 x = from[i];
    const auto wide = [](uint32_t bits) {
      const auto half = static_cast<uint16_t>(bits);
      return kBf16 ? Bf16ToF32(half) : F16ToF32(half);
    };
    to[i] = make_float4(wide(x.x), wide(x.x >> 16), wide(x.y), wide(x.y >> 16));
  }
}
template <bool kBf16>
__global__ void Narrow(const float4* from, uint2* to, size_t count) {
  const size_t stride = static_cast<size_t>(gridDim.x) * kThreads;
  for (size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count / 4; i += stride) {
    const float4 x = from[i];
    const auto pair = [](float low, float high) {
      const uint32_t a = kBf16 ? F32ToBf16(low) : F32ToF16(low), b = kBf16 ? F32ToBf16(high) : F32ToF16(high);
      return b << 16 | a;
    };
    to[i] = make_uint2(pair(x.x, x.y), pair(x.z, x.w));
  }
}

unsigned Ctas(size_t count) {
  return static_cast<unsigned>(std::min<size_t>((count / 4 + kThreads - 1) / kThreads, 4096));
}

}  // namespace

cudaError_t LaunchWiden(const void* from, DataType type, float* to, size_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto* const values = static_cast<const uint2*>(from);
  auto* const wide = reinterpret_cast<float4*>(to);
  if (type == DataType::kBf16)
    Widen<true><<<Ctas(count), kThreads, 0, stream>>>(values, wide, count);
  else
    Widen<false><<<Ctas(count), kThreads, 0, stream>>>(values, wide, count);
  return cudaGetLastError();
}

cudaError_t LaunchNarrow(const float* from, void* to, DataType type, size_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto* const values = reinterpret_cast<const float4*>(from);
  auto* const narrow = static_cast<uint2*>(to);
  if (type == DataType::kBf16)
    Narrow<true><<<Ctas(count), kThreads, 0, stream>>>(values, narrow, count);
  else
    Narrow<false><<<Ctas(count), kThreads, 0, stream>>>(values, narrow, count);
  return cudaGetLastError();
}

}  // namespace kvtide::cuda
