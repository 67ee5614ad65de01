#include "daemon/service/worker_pool.h"

#include "daemon/cache/call/refusal.h"
#include "kernels/base/check.h"

namespace kvtide::service {
namespace {

absl::Status QueueFull() {
  return Refused(Refusal::kQueueFull, absl::ResourceExhaustedError(
                                          "all threads are busy, and as many calls wait as may, most of them "
                                          "this client's or its tenant's; try again later"));
}

}  // namespace

absl::Status ShuttingDown() {
  return Refused(Refusal::kShuttingDown,
                 absl::UnavailableError("kvtided is shutting down; try another one, or again later"));
}

WorkerPool::WorkerPool(int threads, size_t max_queued) : max_queued_(max_queued) {
  KVTIDE_CHECK(threads > 0 && max_queued > 0);
  for (int i = 0; i < threads; i++) threads_.emplace_back([this] { Serve(); });
}

WorkerPool::~WorkerPool() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
  }
  ready_.NotifyAll();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::Submit(Caller caller, Work* work) {
  bool wake = false, closed = false;
  {
    const MutexLock lock(mutex_);
    closed = closed_;
    // Of two, who has more waiting is refused.
    Work* refused = closed_ ? work : nullptr;
    if (!closed_ && queue_.size() >= max_queued_) {
      refused = queue_.TakeFromGreediest(caller);
      if (refused == nullptr) refused = work;
    }
    if (refused != work) {
      queue_.Push(caller, work);
      wake = idle_ > 0;
    }
    work = refused;
  }
  if (work != nullptr) work->Refuse(closed ? ShuttingDown() : QueueFull());
  if (wake) ready_.NotifyOne();
}

bool WorkerPool::Enter() {
  const MutexLock lock(mutex_);
  if (closed_ || queue_.size() > 0 || guests_ >= idle_) return false;
  guests_++;
  return true;
}

bool WorkerPool::EnterBriefly() {
  const MutexLock lock(mutex_);
  if (closed_ || brief_guests_ >= static_cast<int>(threads_.size())) return false;
  brief_guests_++;
  return true;
}

void WorkerPool::LeaveBriefly() {
  const MutexLock lock(mutex_);
  brief_guests_--;
}

void WorkerPool::Leave() {
  const MutexLock lock(mutex_);
  guests_--;
}

void WorkerPool::Close() {
  for (;;) {
    Work* work = nullptr;
    {
      const MutexLock lock(mutex_);
      closed_ = true;
      work = queue_.Pop();
    }
    if (work == nullptr) return;
    work->Refuse(ShuttingDown());
  }
}

size_t WorkerPool::queued() const {
  const MutexLock lock(mutex_);
  return queue_.size();
}

void WorkerPool::Serve() {
  for (;;) {
    Work* work = nullptr;
    {
      const MutexLock lock(mutex_);
      while ((work = queue_.Pop()) == nullptr) {
        if (stopping_) return;
        idle_++;
        ready_.Wait(mutex_);
        idle_--;
      }
    }
    work->Run();
  }
}

}  // namespace kvtide::service
