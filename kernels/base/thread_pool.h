// A ThreadPool shares the iterations of loops among a fixed set of threads, the caller included. Loops of
// several callers run side by side: a worker takes iterations from the oldest loop that still has some.
// ParallelFor returns when all iterations of its own loop are done. A loop body must not start another loop
// on the same pool.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "kernels/base/mutex.h"

namespace kvtide {

class ThreadPool {
 public:
  // `threads` counts the caller of ParallelFor: 1 starts no thread; 0 means one per processor.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(i) once for every i in [0, count), in any order and on any thread of the pool.
  void ParallelFor(int64_t count, absl::FunctionRef<void(int64_t)> body);

 private:
  struct Loop;
  static void Run(Loop& loop);
  void Work();

  Mutex mutex_;
  CondVar wake_;
  std::deque<std::shared_ptr<Loop>> loops_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> workers_;  // set by the constructor
};

}  // namespace kvtide
