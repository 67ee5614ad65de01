// A CopyQueue copies bytes on a thread of its own, beside attention, in the order of submission. A ticket is
// forgotten when Poll has said that it is done. Thread-safe; Submit says ResourceExhausted when `max_tickets`
// are not yet polled to the end.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace kvtide {

class CopyQueue {
 public:
  explicit CopyQueue(int max_tickets) : max_tickets_(max_tickets) {}
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

  const int max_tickets_;
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_;
  std::deque<Job> jobs_;
  std::unordered_map<CopyTicket, bool> done_;
  CopyTicket next_ticket_ = 1;
  bool stopping_ = false;
  std::thread worker_;  // started with the first job
};

}  // namespace kvtide
