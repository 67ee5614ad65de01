#include "kernels/base/thread_pool.h"

#include <algorithm>
#include <atomic>

namespace kvtide {

struct ThreadPool::Loop {
  Loop(int64_t n, absl::FunctionRef<void(int64_t)> f) : count(n), body(f) {}
  const int64_t count;
  const absl::FunctionRef<void(int64_t)>
      body;  // alive until the caller leaves, which waits for done == count
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  int64_t done = 0;  // guarded by mutex
};

ThreadPool::ThreadPool(int threads) {
  if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int i = 1; i < threads; i++) workers_.emplace_back([this] { Work(); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(Loop& loop) {
  int64_t mine = 0;
  for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count; mine++) loop.body(i);
  if (mine == 0) return;
  std::lock_guard<std::mutex> lock(loop.mutex);
  loop.done += mine;
  if (loop.done == loop.count) loop.finished.notify_all();
}

void ThreadPool::Work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !loops_.empty(); });
    if (stopping_) return;
    const std::shared_ptr<Loop> loop = loops_.front();
    if (loop->next.load(std::memory_order_relaxed) >= loop->count) {
      loops_.pop_front();
      continue;
    }
    lock.unlock();
    Run(*loop);
    lock.lock();
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
    std::lock_guard<std::mutex> lock(mutex_);
    loops_.push_back(loop);
  }
  if (count > 2) {
    wake_.notify_all();
  } else {
    wake_.notify_one();
  }
  Run(*loop);
  {
    std::unique_lock<std::mutex> lock(loop->mutex);
    loop->finished.wait(lock, [&] { return loop->done == loop->count; });
  }
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find(loops_.begin(), loops_.end(), loop);
  if (found != loops_.end()) loops_.erase(found);
}

}  // namespace kvtide
