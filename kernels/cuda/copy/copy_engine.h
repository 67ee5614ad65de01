// Copies between device and host memory beside attention: one stream and one thread for each direction.
// Pinned host memory is copied as it is; other host memory goes through two pinned buffers, one being filled
// while the other travels. A ticket is forgotten when Poll has said that it is done. Thread-safe.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <unordered_map>
#include <vector>

#include "kernels/backend.h"
#include "kernels/base/mutex.h"
#include "kernels/cuda/device/device.h"

namespace kvtide::cuda {

class CopyEngine {
 public:
  CopyEngine(int device, size_t piece_bytes, int max_copies)
      : device_(device), piece_bytes_(piece_bytes), max_copies_(max_copies) {}
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  absl::StatusOr<CopyTicket> Submit(std::span<const CopyPiece> pieces, CopyDirection direction);
  absl::StatusOr<bool> Poll(CopyTicket ticket);

 private:
  struct Job {
    CopyTicket ticket = 0;
    CopyDirection direction = CopyDirection::kInside;
    std::vector<CopyPiece> pieces;
  };
  enum Direction { kIn, kOut, kDirections };
  // What one direction works with; its thread's own.
  struct Lane {
    Stream stream;
    PinnedBuffer staging[2];
    Event events[2];
  };
  void Work(Direction direction);
  static absl::Status Open(std::optional<Lane>* lane);
  // The copies of a job, to their end; when it fails, nothing of them is under way any more.
  absl::Status Run(const Job& job, Lane& lane);
  absl::Status Queue(const Job& job, Lane& lane);

  const int device_;
  const size_t piece_bytes_;
  const int max_copies_;
  Mutex mutex_;
  CondVar wake_;
  std::deque<Job> jobs_[kDirections] ABSL_GUARDED_BY(mutex_);
  std::thread threads_[kDirections] ABSL_GUARDED_BY(mutex_);
  std::unordered_map<CopyTicket, std::pair<bool, absl::Status>> state_
      ABSL_GUARDED_BY(mutex_);  // done, result
  CopyTicket next_ ABSL_GUARDED_BY(mutex_) = 1;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace kvtide::cuda
