// Waits for what others do by themselves; only its absence makes a test fail.
#pragma once

#include <chrono>
#include <thread>

namespace kvtide {

// True as soon as the condition is; false after half a minute.
template <class Condition>
bool Eventually(Condition condition) {
  for (int i = 0; i < 6000; i++) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

}  // namespace kvtide
