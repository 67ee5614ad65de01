// The threads that serve calls, and the queue before them. The queue is fair between callers and bounded:
// when it is full, the newest work of who has most waiting makes room for who has less, and is refused.
// Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "daemon/service/fair_queue.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

absl::Status ShuttingDown();

class WorkerPool {
 public:
  // A piece of work, borrowed until one of its functions is called, once.
  class Work {
   public:
    virtual void Run() = 0;
    // It will not run, and why: RESOURCE_EXHAUSTED, the queue is full; UNAVAILABLE, the daemon shuts down.
    virtual void Refuse(const absl::Status& why) = 0;

   protected:
    ~Work() = default;
  };

  WorkerPool(int threads, size_t max_queued);
  // Finishes what is queued.
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // One of the work's functions is called, by any thread: at once, in this one, if it is refused.
  void Submit(Caller caller, Work* work);
  // For threads that could serve a call of their own: true if nothing waits and one of the pool's threads
  // would be free. Then Leave has to be called.
  bool Enter();
  void Leave();
  // The same for a call that takes no longer than handing it over would: it passes those that wait, as long
  // as there are no more such guests than threads. Then LeaveBriefly has to be called.
  bool EnterBriefly();
  void LeaveBriefly();
  // Refuses what is queued; work that is submitted later is refused at once.
  void Close();
  size_t queued() const;

 private:
  void Serve();

  const size_t max_queued_;
  mutable Mutex mutex_;
  CondVar ready_;
  FairQueue<Work> queue_ ABSL_GUARDED_BY(mutex_);
  int idle_ ABSL_GUARDED_BY(mutex_) = 0;
  int guests_ ABSL_GUARDED_BY(mutex_) = 0;  // between Enter and Leave
  int brief_guests_ ABSL_GUARDED_BY(mutex_) = 0;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace kvtide::service
