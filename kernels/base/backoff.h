// Waits for something that can only be asked for: short at first, then without burning a core.
#pragma once

#include <algorithm>
#include <chrono>
#include <thread>

namespace kvtide {

class Backoff {
 public:
  void Wait() {
    if (rounds_++ < 16) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(std::min(rounds_, 200)));
    }
  }

 private:
  int rounds_ = 0;
};

}  // namespace kvtide
