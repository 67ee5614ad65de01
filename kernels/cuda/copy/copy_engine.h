// Copies between device and host memory beside attention: one stream and one thread for each direction.
// Pinned host memory is copied as it is; other host memory goes through two pinned buffers, one being filled
// while the other travels. A ticket is forgotten when Poll has said that it is done. Thread-safe.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <unordered_map>
#include <vector>

#include "kernels/backend.h"
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
  struct Lane {  // one direction
    std::deque<Job> jobs;
    std::thread thread;
  };
  void Work(Lane* lane);
  absl::Status Run(const Job& job, Stream* stream, PinnedBuffer (&staging)[2], Event (&events)[2]);

  const int device_;
  const size_t piece_bytes_;
  const int max_copies_;
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_;
  Lane in_, out_;
  std::unordered_map<CopyTicket, std::pair<bool, absl::Status>> state_;  // done, result
  CopyTicket next_ = 1;
  bool stopping_ = false;
};

}  // namespace kvtide::cuda
