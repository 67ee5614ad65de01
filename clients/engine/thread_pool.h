// A ThreadPool runs the iterations of a loop on a fixed number of threads, the calling thread among them.
// ParallelFor returns when every iteration is done; iterations may run in any order and must not call
// ParallelFor of the same pool. Calls from several threads are served one after the other. Nothing is queued
// beyond the loop that runs, so there is nothing to fill up.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace kvtide::engine {

class ThreadPool {
 public:
  // At least one thread; 0 asks for one per core.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(i) once for every i in [0, count).
  void ParallelFor(int64_t count, absl::FunctionRef<void(int64_t)> body);

 private:
  void WorkerLoop();
  void RunIterations();

  std::mutex caller_mutex_;  // one loop at a time
  std::mutex mutex_;         // guards the fields below, except next_
  std::condition_variable start_;
  std::condition_variable done_;
  const absl::FunctionRef<void(int64_t)>* body_ = nullptr;
  int64_t count_ = 0;
  uint64_t loop_number_ = 0;
  int busy_workers_ = 0;
  bool stopping_ = false;
  std::atomic<int64_t> next_{0};
  std::vector<std::thread> workers_;
};

}  // namespace kvtide::engine
