// The memory of calls under way: their requests as they came, as they are read, and their answers until the
// client has taken them. It is limited in total and for each caller; what does not fit is refused before it
// is made. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>

#include "absl/status/status.h"

namespace kvtide::service {

class MemoryBudget {
 public:
  // What one caller holds; lives as long as any of its holds.
  class Account {
   public:
    int64_t held() const { return held_.load(std::memory_order_relaxed); }

   private:
    friend class MemoryBudget;
    std::atomic<int64_t> held_{0};
  };

  // What one call holds; given back on destruction. Used by one thread at a time.
  class Hold {
   public:
    // Borrows both.
    Hold(MemoryBudget* budget, Account* account) : budget_(budget), account_(account) {}
    ~Hold() { Drop(bytes_); }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

    // ResourceExhausted says whose limit is reached and what to do; then nothing is held besides.
    absl::Status Add(int64_t bytes);
    void Drop(int64_t bytes);
    int64_t bytes() const { return bytes_; }

   private:
    MemoryBudget* const budget_;
    Account* const account_;
    int64_t bytes_ = 0;
  };

  MemoryBudget(int64_t limit, int64_t limit_of_a_caller)
      : limit_(limit), limit_of_a_caller_(limit_of_a_caller) {}

  int64_t limit() const { return limit_; }
  int64_t limit_of_a_caller() const { return limit_of_a_caller_; }
  int64_t held() const { return held_.load(std::memory_order_relaxed); }

 private:
  const int64_t limit_, limit_of_a_caller_;
  std::atomic<int64_t> held_{0};
};

}  // namespace kvtide::service
