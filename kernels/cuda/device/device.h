// CUDA objects as owners: memory, streams, events. One device is current at a time per thread: DeviceGuard
// makes one current for a scope. Move-only, freed on destruction.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/device/cuda_error.h"
#include "kernels/cuda/device/grown_size.h"

namespace kvtide::cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    (void)cudaGetDevice(&before_);
    if (before_ != device) (void)cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Bytes that Buffers of this process hold, of devices and pinned: for tests.
inline std::atomic<int64_t> held_bytes{0};

// Memory of the device, or pinned memory of the host, which kernels may read and write too. Reserve keeps
// nothing of the old contents; nothing on the device may use them any more. It takes more than is asked for
// (grown_size.h), but not more than `most` if it need not.
template <bool kHost>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() { Free(); }

  absl::Status Reserve(size_t bytes, size_t most = SIZE_MAX) {
    if (bytes <= bytes_) return absl::OkStatus();
    const size_t size = GrownSize(bytes_, bytes, most);
    Free();
    void* p = nullptr;
    if (kHost) {
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaHostAlloc(&p, size, cudaHostAllocPortable));
    } else {
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaMalloc(&p, size));
    }
    data_ = static_cast<std::byte*>(p);
    bytes_ = size;
    held_bytes += static_cast<int64_t>(size);
    return absl::OkStatus();
  }
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void Free() {
    if (data_ == nullptr) return;
    if (kHost) {
      (void)cudaFreeHost(data_);
    } else {
      (void)cudaFree(data_);
    }
    held_bytes -= static_cast<int64_t>(bytes_);
    data_ = nullptr;
    bytes_ = 0;
  }
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};
using DeviceBuffer = Buffer<false>;
using PinnedBuffer = Buffer<true>;

class Stream {
 public:
  Stream() = default;
  Stream(Stream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  Stream& operator=(Stream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  ~Stream() {
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }
  absl::Status Create() {
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    return absl::OkStatus();
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() = default;
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~Event() {
    if (event_ != nullptr) (void)cudaEventDestroy(event_);
  }
  absl::Status Create() {
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    return absl::OkStatus();
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace kvtide::cuda
