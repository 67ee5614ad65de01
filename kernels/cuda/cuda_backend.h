// The backend of one NVIDIA GPU: slabs in device memory, attention where the blocks lie, copies to and from
// host memory on streams of their own. Compute capability 8.0 to 12.x, as far as the build has code for it;
// others are refused at creation.
//
// Thread-safe, as Backend says: each call takes a workspace (a stream, scratch memory) from a pool and gives
// it back; when all are in use it waits. A call that fails has waited for all it has begun. CUDA errors are
// statuses, reported by the call that met them; after an error of the device itself every later call is
// Unavailable and says so.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace kvtide {

// How other processes map slabs.
enum class SlabSharing : uint8_t {
  kIpc,          // CUDA IPC: the processes share an IPC namespace
  kDescriptors,  // file descriptors of the driver, which go over a Unix socket
  kAuto,         // CUDA IPC where this process may make handles of it, else descriptors
};

struct CudaBackendOptions {
  std::string device = "0";           // index, or UUID as nvidia-smi prints it ("GPU-...")
  int workspaces = 4;                 // calls that compute at the same time
  size_t scratch_bytes = 256u << 20;  // for blocks that are decoded to f16 first, per workspace
  // Appended rows, queries and results of a call up to so many bytes are read and written by kernels where
  // they lie in pinned memory of the host; larger ones are copied to the device and back.
  size_t in_place_bytes = 1u << 20;
  // A second thread copies tensors of large calls between the caller's memory and pinned memory; it takes up
  // to one core as long as such calls follow each other. On three processors or more.
  bool second_hand = true;
  int most_decode_rows = 256;          // items with more query rows per KV head use the prefill kernels
  bool warpgroups = true;              // false: the prefill kernels for any GPU where 9.0 has its own (tests)
  size_t copy_piece_bytes = 2u << 20;  // of the pinned buffers that copies of other host memory go through
  int max_copies = 4096;               // copies that may be under way at once
  SlabSharing sharing = SlabSharing::kIpc;
};

// NotFound if there is no such device, FailedPrecondition if the driver or the device does not fit.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const CudaBackendOptions& options = {});

// The index of a device that is named as CudaBackendOptions::device. NotFound lists those that there are.
absl::StatusOr<int> FindCudaDevice(const std::string& device);
// "GPU-...", as nvidia-smi prints it.
absl::StatusOr<std::string> CudaDeviceUuid(int index);
// GPUs that this process sees. FailedPrecondition without a driver.
absl::StatusOr<int> CountCudaDevices();

// Registers host memory with the driver for as long as the object lives: copies then run at full speed,
// without a detour over a pinned buffer, and attention of few rows over tensors that lie there reads and
// writes them without a copy by the host. A host tier's slab should be registered once, and so should memory
// in which tensors come again and again. No call may use the memory when the object goes.
class PinnedRange {
 public:
  static absl::StatusOr<std::unique_ptr<PinnedRange>> Make(std::byte* data, size_t bytes);
  ~PinnedRange();
  PinnedRange(const PinnedRange&) = delete;
  PinnedRange& operator=(const PinnedRange&) = delete;

 private:
  explicit PinnedRange(std::byte* data) : data_(data) {}
  std::byte* const data_;
};

}  // namespace kvtide
