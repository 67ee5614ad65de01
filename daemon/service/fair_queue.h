// Work that waits, in turns: of every caller with waiting work one piece is taken before any of them gets a
// second one. Within a caller the order is that of arrival. Not thread-safe; the queue borrows the work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

#include "absl/container/flat_hash_map.h"

namespace kvtide::service {

template <class Work>
class FairQueue {
 public:
  void Push(uint64_t caller, Work* work) {
    const auto [entry, first] = callers_.try_emplace(caller);
    if (first) {
      turns_.push_back(caller);
    }
    entry->second.push_back(work);
    size_++;
  }

  // Null when nothing waits.
  Work* Pop() {
    if (turns_.empty()) return nullptr;
    const uint64_t caller = turns_.front();
    turns_.pop_front();
    const auto entry = callers_.find(caller);
    Work* const work = entry->second.front();
    entry->second.pop_front();
    if (entry->second.empty()) {
      callers_.erase(entry);
    } else {
      turns_.push_back(caller);
    }
    size_--;
    return work;
  }

  size_t size() const { return size_; }

 private:
  absl::flat_hash_map<uint64_t, std::deque<Work*>> callers_;  // those with waiting work
  std::deque<uint64_t> turns_;                                // the same, in the order of their turns
  size_t size_ = 0;
};

}  // namespace kvtide::service
