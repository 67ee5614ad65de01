// What one call computes with: a stream, device scratch, and pinned staging memory. Arrays of a call are
// placed in the staging memory and addressed on the device before they are there. Small calls send nothing:
// kernels read the staging memory where it lies (and write results into pinned memory), which saves the start
// of a copy.
#pragma once

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/mutex.h"
#include "kernels/cuda/device/device.h"

namespace kvtide::cuda {

class Workspace {
 public:
  absl::Status Create() {
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device_));
    for (Event& event : events_)
      if (absl::Status status = event.Create(); !status.ok()) return status;
    return stream_.Create();
  }
  cudaStream_t stream() const { return stream_.get(); }

  // Begins a call that places at most `bytes`; everything placed before is forgotten. in_place: the device
  // reads them in the staging memory.
  absl::Status Begin(size_t bytes, bool in_place = false) {
    KVTIDE_CHECK(!in_flight_, "a call begins while the last one's work is under way");
    if (absl::Status status = staging_.Reserve(bytes); !status.ok()) return status;
    used_ = sent_ = 0;
    capacity_ = bytes;
    in_place_ = in_place;
    in_flight_ = true;  // from now on something may be queued
    return in_place ? absl::OkStatus() : uploaded_.Reserve(bytes);
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
    std::byte* const host = staging_.data() + at;
    return {reinterpret_cast<T*>(host), reinterpret_cast<T*>(in_place_ ? host : uploaded_.data() + at)};
  }
  template <class T>
  T* Upload(const std::vector<T>& values) {
    const Placed<T> placed = Place<T>(values.size());
    if (!values.empty()) std::memcpy(placed.host, values.data(), values.size() * sizeof(T));
    return placed.device;
  }
  static size_t Bound(size_t arrays, size_t bytes) { return bytes + 256 * (arrays + 1); }
  bool in_place() const { return in_place_; }
  // Sends what was placed since the last time to the device.
  absl::Status Send() {
    if (in_place_ || used_ == sent_) return absl::OkStatus();
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(uploaded_.data() + sent_, staging_.data() + sent_,
                                                used_ - sent_, cudaMemcpyHostToDevice, stream()));
    sent_ = used_;
    return absl::OkStatus();
  }
  // What went wrong on the device so far, without a wait for the rest; on any thread. done: whether all is
  // over.
  absl::Status Look(bool* done) const {
    const DeviceGuard guard(device_);
    const cudaError_t error = KVTIDE_CUDA_TRY(cudaStreamQuery(stream()));
    *done = error == cudaSuccess;
    if (error != cudaErrorNotReady) return StatusOf(error, "the work of a call");
    (void)cudaGetLastError();
    return absl::OkStatus();
  }
  // Waits for everything that the call has queued.
  absl::Status Finish() {
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream()));
    in_flight_ = false;
    return absl::OkStatus();
  }
  // The same for a call that ends early, whatever has happened: nobody reuses or frees memory under running
  // work.
  void Abandon() {
    if (!in_flight_) return;
    in_flight_ = false;
    (void)StatusOf(cudaStreamSynchronize(stream()), "the work of a call that failed");
  }
  // Keeps the host at most two steps of a long call ahead of the device: waits for the last step but one.
  absl::Status EndStep() {
    Event& event = events_[step_++ % 2];
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(event.get(), stream()));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(events_[step_ % 2].get()));
    return absl::OkStatus();
  }

  DeviceBuffer partials, sent_queries, sent_rows, queries, results, scratch, rows;
  PinnedBuffer results_host;

 private:
  int device_ = 0;
  Stream stream_;
  Event events_[2];
  PinnedBuffer staging_;
  DeviceBuffer uploaded_;
  size_t used_ = 0, sent_ = 0, capacity_ = 0, step_ = 0;
  bool in_place_ = false, in_flight_ = false;
};

// Thread-safe.
class WorkspacePool {
 public:
  explicit WorkspacePool(int limit) : limit_(limit) {}

  // A workspace for one call. Its end waits for what the call has queued and not waited for itself.
  class Lease {
   public:
    Lease(WorkspacePool* pool, std::unique_ptr<Workspace> workspace)
        : pool_(pool), workspace_(std::move(workspace)) {}
    Lease(Lease&&) = default;
    ~Lease() {
      if (workspace_ == nullptr) return;
      workspace_->Abandon();
      pool_->Return(std::move(workspace_));
    }
    Workspace* operator->() const { return workspace_.get(); }
    Workspace& operator*() const { return *workspace_; }

   private:
    WorkspacePool* pool_;
    std::unique_ptr<Workspace> workspace_;
  };

  // Waits while all are in use.
  absl::StatusOr<Lease> Take() {
    const MutexLock lock(mutex_);
    while (free_.empty() && made_ >= limit_) wake_.Wait(mutex_);
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
      const MutexLock lock(mutex_);
      free_.push_back(std::move(workspace));
    }
    wake_.NotifyAll();
  }

  const int limit_;
  Mutex mutex_;
  CondVar wake_;
  std::vector<std::unique_ptr<Workspace>> free_ ABSL_GUARDED_BY(mutex_);
  int made_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace kvtide::cuda
