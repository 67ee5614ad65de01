// A wish to stop: set by whoever no longer wants the result, looked at by long work between its steps.
// Thread-safe; looking costs one relaxed load.
#pragma once

#include <atomic>

namespace kvtide {

class Cancellation {
 public:
  void Cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> cancelled_{false};
};

// Null: nobody can stop the work.
inline bool IsCancelled(const Cancellation* cancellation) {
  return cancellation != nullptr && cancellation->cancelled();
}

}  // namespace kvtide
