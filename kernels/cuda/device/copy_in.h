// Copies from pinned memory of the host to the device by a kernel: some hundred KB are there before a copy
// engine has begun, and each byte crosses the bus once, however often the kernels behind read it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <vector>

#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

// Both begin at multiples of 16 bytes.
cudaError_t LaunchCopyIn(const void* pinned, void* device, size_t bytes, cudaStream_t stream);

// Pieces from all over pinned memory, by one kernel. Starts and sizes are multiples of 16 bytes.
class CopiesIn {
 public:
  struct Piece {
    const void* pinned = nullptr;
    void* device = nullptr;
    size_t bytes = 0;
  };
  void Add(const void* pinned, void* device, size_t bytes);
  // Of the list, which the call places in its staging memory; at most for `pieces`.
  static size_t staging_bytes(size_t pieces) { return pieces * sizeof(Piece); }
  // Places the list and queues the kernel; nothing for no pieces. The workspace is one in place.
  absl::Status Launch(Workspace& workspace) const;

 private:
  std::vector<Piece> pieces_;
  size_t most_bytes_ = 0;
};

}  // namespace kvtide::cuda
