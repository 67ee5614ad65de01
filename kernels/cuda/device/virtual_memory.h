// Device memory that other processes map by a file descriptor (CUDA's virtual memory management), where CUDA
// IPC is not allowed: containers without a common IPC namespace, or drivers without it. A SlabHandle names it
// by kFile, with the GPU as its device. The functions are the driver's, found at run time
// (cudaGetDriverEntryPointByVersion): nothing links libcuda.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvtide::cuda {

class VirtualMemory {
 public:
  // Of the current device. FailedPrecondition where driver or device share no memory this way,
  // ResourceExhausted where there is not enough of it.
  static absl::StatusOr<std::unique_ptr<VirtualMemory>> Make(size_t bytes);
  // What another process has made on the same GPU, by its descriptor, which is taken. Unavailable if the
  // driver does not map it.
  static absl::StatusOr<std::unique_ptr<VirtualMemory>> Import(int fd, size_t bytes);
  // No work that uses it may be under way.
  ~VirtualMemory();
  VirtualMemory(const VirtualMemory&) = delete;
  VirtualMemory& operator=(const VirtualMemory&) = delete;

  std::byte* data() const { return data_; }
  // What Import takes in another process; -1 for what was imported.
  int fd() const { return fd_; }

 private:
  VirtualMemory() = default;
  absl::Status Map(size_t bytes, int device, unsigned long long handle);

  std::byte* data_ = nullptr;
  size_t bytes_ = 0;     // of the mapping, in whole pages of the device
  bool mapped_ = false;  // else only addresses are taken
  int fd_ = -1;
};

}  // namespace kvtide::cuda
