// Runs the parts of a call side by side: the first on the caller's thread, each other one on a thread that
// stays for later calls. A thread is started only when none is idle, so there are at most as many as parts
// ever ran at once. Thread-safe: parts of different calls do not wait for each other. Destruction comes after
// the last call.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <span>
#include <thread>
#include <vector>

#include "kernels/base/mutex.h"

namespace kvtide {

class SideBySide {
 public:
  SideBySide() = default;
  ~SideBySide();
  SideBySide(const SideBySide&) = delete;
  SideBySide& operator=(const SideBySide&) = delete;

  // Returns when all parts are done.
  void Run(std::span<const std::function<void()>> parts);
  size_t threads() const;

 private:
  struct Part {
    const std::function<void()>* run = nullptr;
    size_t* left = nullptr;  // parts of its call that are not done; under mu_
  };
  void Work();

  mutable Mutex mu_;
  CondVar wake_, done_;
  std::deque<Part> waiting_ ABSL_GUARDED_BY(mu_);
  size_t idle_ ABSL_GUARDED_BY(mu_) = 0;  // threads without a part, woken or not
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvtide
