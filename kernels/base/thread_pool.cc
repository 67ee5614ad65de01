#include "kernels/base/thread_pool.h"

#include <algorithm>
#include <atomic>

namespace kvtide {

struct ThreadPool::Loop {
  Loop(int64_t n, absl::FunctionRef<void(int64_t)> f) : count(n), body(f) {}
  const int64_t count;
  // Alive until the caller leaves, which waits for done == count.
  const absl::FunctionRef<void(int64_t)> body;
  std::atomic<int64_t> next{0};
  Mutex mutex;
  CondVar finished;
  int64_t done ABSL_GUARDED_BY(mutex) = 0;
};

ThreadPool::ThreadPool(int threads) {
  if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int i = 1; i < threads; i++) workers_.emplace_back([this] { Work(); });
}

ThreadPool::~ThreadPool() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
  }
  wake_.NotifyAll();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(Loop& loop) {
  int64_t mine = 0;
  for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count; mine++) loop.body(i);
  if (mine == 0) return;
  MutexLock lock(loop.mutex);
  loop.done += mine;
  if (loop.done == loop.count) loop.finished.NotifyAll();
}

void ThreadPool::Work() {
  for (;;) {
    std::shared_ptr<Loop> loop;
    {
      MutexLock lock(mutex_);
      for (;;) {
        while (!stopping_ && loops_.empty()) wake_.Wait(mutex_);
        if (stopping_) return;
        loop = loops_.front();
        if (loop->next.load(std::memory_order_relaxed) < loop->count) break;
        loops_.pop_front();
      }
    }
    Run(*loop);
  }
}

void ThreadPool::ParallelFor(int64_t count, absl::FunctionRef<void(int64_t)> body) {
  if (count <= 0) return;
  if (count == 1 || workers_.empty()) {
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
  const auto loop = std::make_shared<Loop>(count, body);
  {
    MutexLock lock(mutex_);
    loops_.push_back(loop);
  }
  if (count > 2) {
    wake_.NotifyAll();
  } else {
    wake_.NotifyOne();
  }
  Run(*loop);
  {
    MutexLock lock(loop->mutex);
    while (loop->done != loop->count) loop->finished.Wait(loop->mutex);
  }
  MutexLock lock(mutex_);
  const auto found = std::find(loops_.begin(), loops_.end(), loop);
  if (found != loops_.end()) loops_.erase(found);
}

}  // namespace kvtide
