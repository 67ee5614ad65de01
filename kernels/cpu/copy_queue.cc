#include "kernels/cpu/copy_queue.h"

#include <cstring>
#include <utility>

#include "kernels/base/status.h"

namespace kvtide {

absl::Status CheckPiece(const CopyPiece& piece) {
  if (piece.bytes == 0 || (piece.target != nullptr && piece.source != nullptr)) return absl::OkStatus();
  return absl::InvalidArgumentError("copy piece without source or target");
}

CopyQueue::~CopyQueue() {
  std::thread worker;
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    worker = std::move(worker_);
  }
  wake_.NotifyAll();
  if (worker.joinable()) worker.join();
}

absl::StatusOr<CopyTicket> CopyQueue::Submit(std::span<const CopyPiece> pieces) {
  for (const CopyPiece& piece : pieces) KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
  MutexLock lock(mutex_);
  KVTIDE_ASSIGN_OR_RETURN(const CopyTicket ticket, tickets_.Issue());
  jobs_.push_back({ticket, std::vector<CopyPiece>(pieces.begin(), pieces.end())});
  if (!worker_.joinable()) worker_ = std::thread([this] { Work(); });
  wake_.NotifyOne();
  return ticket;
}

absl::StatusOr<bool> CopyQueue::Poll(CopyTicket ticket) {
  MutexLock lock(mutex_);
  return tickets_.Poll(ticket);
}

void CopyQueue::Work() {
  for (;;) {
    Job job;
    {
      MutexLock lock(mutex_);
      while (!stopping_ && jobs_.empty()) wake_.Wait(mutex_);
      if (stopping_) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    for (const CopyPiece& piece : job.pieces)
      if (piece.bytes != 0) std::memcpy(piece.target, piece.source, piece.bytes);
    MutexLock lock(mutex_);
    tickets_.Finish(job.ticket, absl::OkStatus());
  }
}

}  // namespace kvtide
