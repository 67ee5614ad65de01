// What one call computes with: a stream, device scratch, and staging memory that goes to the device in one
// copy. Arrays of a call are placed in the staging memory and addressed on the device before they are there.
#pragma once

#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/cuda/device/device.h"

namespace kvtide::cuda {

class Workspace {
 public:
  absl::Status Create() { return stream_.Create(); }
  cudaStream_t stream() const { return stream_.get(); }

  // Begins a call that uploads at most `bytes`; everything placed before is forgotten.
  absl::Status Begin(size_t bytes) {
    const absl::Status host = staging_.Reserve(bytes);
    if (!host.ok()) return host;
    used_ = 0;
    capacity_ = bytes;
    return uploaded_.Reserve(bytes);
  }
  // Room for `count` values: where to write them, and where the device will find them.
  template <class T>
  struct Placed {
    T* host = nullptr;
    T* device = nullptr;
  };
  template <class T>
  Placed<T> Place(size_t count) {
    const size_t at = (used_ + 255) / 256 * 256;
    used_ = at + count * sizeof(T);
    KVTIDE_CHECK(used_ <= capacity_, "staging of ", capacity_, " bytes is too small");
    return {reinterpret_cast<T*>(staging_.data() + at), reinterpret_cast<T*>(uploaded_.data() + at)};
  }
  template <class T>
  T* Upload(const std::vector<T>& values) {
    const Placed<T> placed = Place<T>(values.size());
    if (!values.empty()) std::memcpy(placed.host, values.data(), values.size() * sizeof(T));
    return placed.device;
  }
  static size_t Bound(size_t arrays, size_t bytes) { return bytes + 256 * (arrays + 1); }
  // Sends what was placed to the device.
  absl::Status Send() {
    return StatusOf(
        cudaMemcpyAsync(uploaded_.data(), staging_.data(), used_, cudaMemcpyHostToDevice, stream()),
        "upload");
  }
  absl::Status Finish() { return StatusOf(cudaStreamSynchronize(stream()), "kernels"); }

  DeviceBuffer partials, queries, results, scratch, rows;
  PinnedBuffer results_host;

 private:
  Stream stream_;
  PinnedBuffer staging_;
  DeviceBuffer uploaded_;
  size_t used_ = 0, capacity_ = 0;
};

class WorkspacePool {
 public:
  explicit WorkspacePool(int limit) : limit_(limit) {}

  class Lease {
   public:
    Lease(WorkspacePool* pool, std::unique_ptr<Workspace> workspace)
        : pool_(pool), workspace_(std::move(workspace)) {}
    Lease(Lease&&) = default;
    ~Lease() {
      if (workspace_ != nullptr) pool_->Return(std::move(workspace_));
    }
    Workspace* operator->() const { return workspace_.get(); }
    Workspace& operator*() const { return *workspace_; }

   private:
    WorkspacePool* pool_;
    std::unique_ptr<Workspace> workspace_;
  };

  absl::StatusOr<Lease> Take() {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [this] { return !free_.empty() || made_ < limit_; });
    if (!free_.empty()) {
      std::unique_ptr<Workspace> workspace = std::move(free_.back());
      free_.pop_back();
      return Lease(this, std::move(workspace));
    }
    auto workspace = std::make_unique<Workspace>();
    const absl::Status created = workspace->Create();
    if (!created.ok()) return created;
    made_++;
    return Lease(this, std::move(workspace));
  }

 private:
  void Return(std::unique_ptr<Workspace> workspace) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(std::move(workspace));
    }
    wake_.notify_one();
  }

  const int limit_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::vector<std::unique_ptr<Workspace>> free_;
  int made_ = 0;
};

}  // namespace kvtide::cuda
