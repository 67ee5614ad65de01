// A clock that stands still until a test moves it. Thread-safe.
#pragma once

#include <atomic>
#include <functional>

#include "absl/time/time.h"

namespace kvtide::testing {

class FakeClock {
 public:
  void Reset() { nanoseconds_ = kStart; }
  void Advance(absl::Duration by) { nanoseconds_ += absl::ToInt64Nanoseconds(by); }
  std::function<absl::Time()> function() {
    return [this] { return absl::UnixEpoch() + absl::Nanoseconds(nanoseconds_.load()); };
  }

 private:
  static constexpr int64_t kStart = 1'000'000'000;
  std::atomic<int64_t> nanoseconds_{kStart};
};

}  // namespace kvtide::testing
