// Where an engine computes that maps the pool of a daemon into its own process (the direct way): it reads and
// writes blocks where they lie, with kernels on its own streams. The CPU and CUDA implement it
// (kernels/cpu/cpu_direct_device.h, kernels/cuda/cuda_direct_device.h).
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/paged_attention.h"
#include "kernels/slab_handle.h"

namespace kvtide {

// Arrays that the host fills and kernels read. Not thread-safe.
class StepArrays {
 public:
  struct Range {
    size_t offset = 0, bytes = 0;
  };
  virtual ~StepArrays() = default;
  // To be filled; waits until what was uploaded from there before has been copied.
  virtual absl::StatusOr<std::byte*> Host() = 0;
  // Where kernels find it.
  virtual const std::byte* device() const = 0;
  // In the order of the stream's work.
  virtual absl::Status Upload(std::span<const Range> ranges, void* stream) = 0;
};

// A point in the work of a stream.
class StreamMark {
 public:
  virtual ~StreamMark() = default;
  virtual absl::Status Set(void* stream) = 0;
  // Until the work before the mark is done.
  virtual absl::Status Wait() = 0;
};

class DirectDevice {
 public:
  virtual ~DirectDevice() = default;
  // "cpu", or the GPU's UUID as nvidia-smi prints it.
  virtual std::string id() const = 0;
  // Maps a slab of another process. A file descriptor is taken. FailedPrecondition if it is another device's;
  // Unavailable where this system does not let processes share such memory, with what to do.
  virtual absl::StatusOr<std::unique_ptr<Slab>> Map(const SlabHandle& handle) = 0;
  virtual absl::StatusOr<std::unique_ptr<PagedAttention>> MakeAttention(
      const PagedOptions& options, std::span<const PagedLayer> layers) = 0;
  virtual absl::StatusOr<std::unique_ptr<StepArrays>> MakeArrays(size_t bytes) = 0;
  virtual absl::StatusOr<std::unique_ptr<StreamMark>> MakeMark() = 0;
};

}  // namespace kvtide
