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

// CTAs (x, y): part y of piece x.
__global__ void CopyPiecesInKernel(const CopiesIn::Piece* pieces) {
  const CopiesIn::Piece piece = pieces[blockIdx.x];
  const auto* const from = static_cast<const uint4*>(piece.pinned);
  auto* const to = static_cast<uint4*>(piece.device);
  for (size_t i = size_t{blockIdx.y} * kThreads + threadIdx.x; i < piece.bytes / sizeof(uint4);
       i += size_t{gridDim.y} * kThreads)
    to[i] = from[i];
}

}  // namespace

cudaError_t LaunchCopyIn(const void* pinned, void* device, size_t bytes, cudaStream_t stream) {
  const auto ctas = static_cast<unsigned>(std::clamp<size_t>(bytes / (16 * kThreads), 1, kMostCtas));
  CopyInKernel<<<ctas, kThreads, 0, stream>>>(static_cast<const uint8_t*>(pinned),
                                              static_cast<uint8_t*>(device), bytes);
  return cudaGetLastError();
}

void CopiesIn::Add(const void* pinned, void* device, size_t bytes) {
  if (bytes == 0) return;
  pieces_.push_back({pinned, device, bytes});
  most_bytes_ = std::max(most_bytes_, bytes);
}

absl::Status CopiesIn::Launch(Workspace& workspace) const {
  if (pieces_.empty()) return absl::OkStatus();
  const Piece* const list = workspace.Upload(pieces_);
  const dim3 ctas(static_cast<unsigned>(pieces_.size()),
                  static_cast<unsigned>(std::clamp<size_t>(most_bytes_ / (16 * kThreads), 1, 64)));
  CopyPiecesInKernel<<<ctas, kThreads, 0, workspace.stream()>>>(list);
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace kvtide::cuda
