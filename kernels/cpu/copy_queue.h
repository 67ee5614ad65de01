// A CopyQueue copies bytes on a thread of its own, beside attention, in the order of submission. A ticket is
// forgotten when Poll has said that it is done. Thread-safe; Submit says ResourceExhausted when `max_tickets`
// are not yet polled to the end.
#pragma once

#include <deque>
#include <span>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/base/mutex.h"
#include "kernels/base/tickets.h"

namespace kvtide {

// InvalidArgument for bytes from or to nowhere.
absl::Status CheckPiece(const CopyPiece& piece);

class CopyQueue {
 public:
  explicit CopyQueue(int max_tickets) : tickets_(static_cast<size_t>(max_tickets)) {}
  ~CopyQueue();
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  absl::StatusOr<CopyTicket> Submit(std::span<const CopyPiece> pieces);
  absl::StatusOr<bool> Poll(CopyTicket ticket);

 private:
  struct Job {
    CopyTicket ticket = 0;
    std::vector<CopyPiece> pieces;
  };
  void Work();

  Mutex mutex_;
  CondVar wake_;
  std::deque<Job> jobs_ ABSL_GUARDED_BY(mutex_);
  TicketBook tickets_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread worker_ ABSL_GUARDED_BY(mutex_);  // started with the first job
};

}  // namespace kvtide
