#include "kernels/cpu/copy_queue.h"

#include <cstring>

#include "absl/strings/str_cat.h"

namespace kvtide {

CopyQueue::~CopyQueue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (worker_.joinable()) worker_.join();
}

absl::StatusOr<CopyTicket> CopyQueue::Submit(std::span<const CopyPiece> pieces) {
  for (const CopyPiece& piece : pieces)
    if (piece.bytes != 0 && (piece.target == nullptr || piece.source == nullptr))
      return absl::InvalidArgumentError("copy piece without source or target");
  std::lock_guard<std::mutex> lock(mutex_);
  if (done_.size() >= static_cast<size_t>(max_tickets_))
    return absl::ResourceExhaustedError(
        absl::StrCat(done_.size(), " copies are not yet polled to their end, the limit is ", max_tickets_));
  const CopyTicket ticket = next_ticket_++;
  done_[ticket] = false;
  jobs_.push_back({ticket, std::vector<CopyPiece>(pieces.begin(), pieces.end())});
  if (!worker_.joinable()) worker_ = std::thread([this] { Work(); });
  wake_.notify_one();
  return ticket;
}

absl::StatusOr<bool> CopyQueue::Poll(CopyTicket ticket) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = done_.find(ticket);
  if (found == done_.end())
    return absl::InvalidArgumentError(
        absl::StrCat("copy ticket ", ticket, " is unknown or was polled to its end"));
  const bool done = found->second;
  if (done) done_.erase(found);
  return done;
}

void CopyQueue::Work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    const Job job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    for (const CopyPiece& piece : job.pieces)
      if (piece.bytes != 0) std::memcpy(piece.target, piece.source, piece.bytes);
    lock.lock();
    done_[job.ticket] = true;
  }
}

}  // namespace kvtide
