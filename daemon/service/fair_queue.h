// Work that waits, in turns: tenants take turns, and within a tenant its callers do. Of every tenant with
// waiting work one piece is taken before any of them gets a second one, and so of every caller within its
// tenant. Within a caller the order is that of arrival. Not thread-safe; the queue borrows the work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <utility>

#include "absl/container/flat_hash_map.h"

namespace kvtide::service {

// Turns between keys that have something waiting.
template <class Key, class Queue>
class Turns {
 public:
  // The queue of a key, which has a turn from now on; something is put into it at once.
  Queue& Of(const Key& key) {
    const auto [entry, first] = queues_.try_emplace(key);
    if (first) turns_.push_back(key);
    return entry->second;
  }
  // Takes one piece from the queue whose turn it is; `pop` takes it and says whether more is left.
  template <class Pop>
  bool Next(Pop pop) {
    if (turns_.empty()) return false;
    const Key key = std::move(turns_.front());
    turns_.pop_front();
    const auto entry = queues_.find(key);
    if (pop(entry->second)) {
      turns_.push_back(key);
    } else {
      queues_.erase(entry);
    }
    return true;
  }
  bool empty() const { return turns_.empty(); }

 private:
  absl::flat_hash_map<Key, Queue> queues_;  // those with waiting work
  std::deque<Key> turns_;                   // the same, in the order of their turns
};

// Who waits: a tenant (a hash of its name) and one of its callers.
struct Caller {
  uint64_t tenant = 0, number = 0;
};

template <class Work>
class FairQueue {
 public:
  void Push(Caller caller, Work* work) {
    tenants_.Of(caller.tenant).Of(caller.number).push_back(work);
    size_++;
  }

  // Null when nothing waits.
  Work* Pop() {
    Work* work = nullptr;
    tenants_.Next([&](Turns<uint64_t, std::deque<Work*>>& callers) {
      callers.Next([&](std::deque<Work*>& queue) {
        work = queue.front();
        queue.pop_front();
        return !queue.empty();
      });
      return !callers.empty();
    });
    if (work != nullptr) size_--;
    return work;
  }

  size_t size() const { return size_; }

 private:
  Turns<uint64_t, Turns<uint64_t, std::deque<Work*>>> tenants_;
  size_t size_ = 0;
};

}  // namespace kvtide::service
