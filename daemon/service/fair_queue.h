// Work that waits, in turns: tenants take turns, and within a tenant its callers do. Of every tenant with
// waiting work one piece is taken before any of them gets a second one, and so of every caller within its
// tenant. Within a caller the order is that of arrival. Where there is no room for all, who has most waiting
// makes room for others. Not thread-safe; the queue borrows the work.
#pragma once

#include <algorithm>
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
  // Null where the key has nothing waiting.
  Queue* Find(const Key& key) {
    const auto found = queues_.find(key);
    return found == queues_.end() ? nullptr : &found->second;
  }
  // That with the largest size(), with its key; null where nothing waits.
  std::pair<const Key, Queue>* Longest() {
    std::pair<const Key, Queue>* longest = nullptr;
    for (auto& entry : queues_)
      if (longest == nullptr || entry.second.size() > longest->second.size()) longest = &entry;
    return longest;
  }
  // One that has nothing left, out of its turn.
  void Forget(const Key& key) {
    queues_.erase(key);
    turns_.erase(std::find(turns_.begin(), turns_.end(), key));
  }

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
    Tenant& tenant = tenants_.Of(caller.tenant);
    tenant.callers.Of(caller.number).push_back(work);
    tenant.waiting++;
    size_++;
  }

  // A place for one more of the caller where none is left: the newest piece of who has most waiting, taken
  // out of the queue. First among tenants, then among the callers of its own. Null: nobody has two more than
  // it has.
  Work* TakeFromGreediest(Caller caller) {
    Tenant* const own = tenants_.Find(caller.tenant);
    auto* const most = tenants_.Longest();
    if (most != nullptr && most->second.size() > 1 + (own == nullptr ? 0 : own->size()))
      return TakeNewest(&most->second);
    if (own == nullptr) return nullptr;
    const std::deque<Work*>* const mine = own->callers.Find(caller.number);
    if (own->callers.Longest()->second.size() <= 1 + (mine == nullptr ? 0 : mine->size())) return nullptr;
    return TakeNewest(own);
  }

  // Null when nothing waits.
  Work* Pop() {
    Work* work = nullptr;
    tenants_.Next([&](Tenant& tenant) {
      tenant.callers.Next([&](std::deque<Work*>& queue) {
        work = queue.front();
        queue.pop_front();
        return !queue.empty();
      });
      tenant.waiting--;
      return !tenant.callers.empty();
    });
    if (work != nullptr) size_--;
    return work;
  }

  size_t size() const { return size_; }

 private:
  struct Tenant {
    Turns<uint64_t, std::deque<Work*>> callers;
    size_t waiting = 0;
    size_t size() const { return waiting; }
  };
  // Of the caller that has most waiting. The tenant has one piece left at least.
  Work* TakeNewest(Tenant* tenant) {
    auto& [caller, queue] = *tenant->callers.Longest();
    Work* const work = queue.back();
    queue.pop_back();
    if (queue.empty()) tenant->callers.Forget(caller);
    tenant->waiting--;
    size_--;
    return work;
  }

  Turns<uint64_t, Tenant> tenants_;
  size_t size_ = 0;
};

}  // namespace kvtide::service
