// A second pair of hands for work of some ten microseconds, as copies of some hundred KB: one thread that
// takes items of a loop beside the caller. It looks for work without sleeping as long as loops follow each
// other
// (`hot`), so that it is there at once; if it is not, or works for another caller, the caller does all by
// itself. Costs up to one core while calls come, and none otherwise.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "kernels/base/mutex.h"

namespace kvtide {

class SecondHand {
 public:
  explicit SecondHand(std::chrono::microseconds hot = std::chrono::milliseconds(2));
  ~SecondHand();
  SecondHand(const SecondHand&) = delete;
  SecondHand& operator=(const SecondHand&) = delete;

  // Calls body(i) once for every i in [0, count), in any order, on this thread and perhaps on the other one.
  // Several callers may do so at once.
  void Share(size_t count, absl::FunctionRef<void(size_t)> body);

 private:
  // Of the one loop that is offered: nobody's, to be taken, in the thread's hands.
  enum class Offer : int { kNone, kOpen, kTaken };
  struct Loop {
    size_t count = 0;
    absl::FunctionRef<void(size_t)> body;
    std::atomic<size_t> next{0};
  };

  static void Run(Loop& loop);
  void Work();

  const std::chrono::microseconds hot_;
  std::atomic<bool> busy_{false};  // a caller has the thread
  std::atomic<Offer> offer_{Offer::kNone};
  Loop* loop_ = nullptr;  // of that caller; published by offer_
  std::atomic<bool> asleep_{false}, stopping_{false};
  Mutex mutex_;
  CondVar wake_;
  std::thread thread_;  // last: it uses the others
};

}  // namespace kvtide
