#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device/copy_in.h"

namespace kvtide::cuda {
namespace {

constexpr unsigned kThreads = 256, kMostCtas = 512;

__global__ void CopyInKernel(const uint8_t* from, uint8_t* to, size_t bytes) {
  const size_t whole = bytes / 16, first = size_t{blockIdx.x} * kThreads + threadIdx.x;
  for (size_t i = first; i < whole; i += size_t{gridDim.x} * kThreads)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  if (const size_t i = 16 * whole + first; i < bytes) to[i] = from[i];
}

}  // namespace

cudaError_t LaunchCopyIn(const void* pinned, void* device, size_t bytes, cudaStream_t stream) {
  const auto ctas = static_cast<unsigned>(std::clamp<size_t>(bytes / (16 * kThreads), 1, kMostCtas));
  CopyInKernel<<<ctas, kThreads, 0, stream>>>(static_cast<const uint8_t*>(pinned),
                                              static_cast<uint8_t*>(device), bytes);
  return cudaGetLastError();
}

}  // namespace kvtide::cuda
