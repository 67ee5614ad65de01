// Arrays that the host makes again and again and the device reads, in one piece of memory: what is the same
// as the last time is not sent again. Arrays that change little should keep their places: they come first,
// and with room to grow.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/cuda/device/device.h"

namespace kvtide::cuda {

class TableMemory {
 public:
  // Begins anew, for at most `bytes`. Nothing on the device may read the memory any more.
  absl::Status Begin(size_t bytes) {
    if (bytes > device_.bytes()) known_ = 0;
    if (absl::Status status = image_.Reserve(bytes); !status.ok()) return status;
    if (absl::Status status = device_.Reserve(bytes); !status.ok()) return status;
    used_ = 0;
    capacity_ = bytes;
    return absl::OkStatus();
  }
  template <class T>
  struct Placed {
    T* host = nullptr;
    T* device = nullptr;
  };
  // Room for `count` values, and for `room` at this place.
  template <class T>
  Placed<T> Place(size_t count, size_t room = 0) {
    const size_t at = (used_ + 255) / 256 * 256, end = at + std::max(count, room) * sizeof(T);
    KVTIDE_CHECK(end <= capacity_, "tables of ", capacity_, " bytes are too small");
    std::memset(image_.data() + used_, 0, at - used_);
    std::memset(image_.data() + at + count * sizeof(T), 0, end - at - count * sizeof(T));
    used_ = end;
    return {reinterpret_cast<T*>(image_.data() + at), reinterpret_cast<T*>(device_.data() + at)};
  }
  template <class T>
  T* Upload(const std::vector<T>& values) {
    const Placed<T> placed = Place<T>(values.size());
    if (!values.empty()) std::memcpy(placed.host, values.data(), values.size() * sizeof(T));
    return placed.device;
  }
  static size_t Bound(size_t arrays, size_t bytes) { return bytes + 256 * (arrays + 1); }

  // Queues the copies of what the device does not hold yet. The image must stay as it is until they are done.
  absl::Status Send(cudaStream_t stream) {
    constexpr size_t kPiece = size_t{4} << 10, kGap = size_t{32} << 10;
    const size_t known = known_;
    known_ = 0;  // until all copies are queued
    mirror_.resize(std::max(mirror_.size(), used_));
    for (size_t at = 0; at < used_;) {
      if (Same(at, std::min(kPiece, used_ - at), known)) {
        at += kPiece;
        continue;
      }
      size_t end = at + kPiece;  // behind the last piece that differs
      for (size_t next = end; next < std::min(used_, end + kGap); next += kPiece)
        if (!Same(next, std::min(kPiece, used_ - next), known)) end = next + kPiece;
      end = std::min(end, used_);
      std::memcpy(mirror_.data() + at, image_.data() + at, end - at);
      KVTIDE_CUDA_RETURN_IF_ERROR(
          cudaMemcpyAsync(device_.data() + at, image_.data() + at, end - at, cudaMemcpyHostToDevice, stream));
      sent_bytes_ += end - at;
      at = end;
    }
    known_ = std::max(known, used_);
    return absl::OkStatus();
  }
  // What the device holds is in doubt: the next Send sends everything.
  void Forget() { known_ = 0; }

  size_t device_bytes() const { return device_.bytes(); }
  size_t sent_bytes() const { return sent_bytes_; }  // of all Sends together

 private:
  bool Same(size_t at, size_t bytes, size_t known) const {
    return at + bytes <= known && std::memcmp(image_.data() + at, mirror_.data() + at, bytes) == 0;
  }

  PinnedBuffer image_;
  DeviceBuffer device_;
  std::vector<std::byte> mirror_;  // the device's first `known_` bytes
  size_t known_ = 0, used_ = 0, capacity_ = 0, sent_bytes_ = 0;
};

}  // namespace kvtide::cuda
