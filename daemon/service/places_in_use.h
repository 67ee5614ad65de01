// Blocks that the client of a session reads where they lie: loads in place that it has not given back. They
// end with the session. Thread-safe.
#pragma once

#include <utility>

#include "absl/container/flat_hash_set.h"
#include "daemon/cache/call/keyed_calls.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

class PlacesInUse {
 public:
  // `tier`: that of host memory which the client has mapped; -1 = none.
  explicit PlacesInUse(int tier) : tier_(tier) {}

  int tier() const { return tier_; }
  void Add(PlacesId id) {
    const MutexLock lock(mutex_);
    ids_.insert(id);
  }
  // False if it is none of these.
  bool Take(PlacesId id) {
    const MutexLock lock(mutex_);
    return ids_.erase(id) > 0;
  }
  absl::flat_hash_set<PlacesId> TakeAll() {
    const MutexLock lock(mutex_);
    return std::exchange(ids_, {});
  }
  bool empty() const {
    const MutexLock lock(mutex_);
    return ids_.empty();
  }

 private:
  const int tier_;
  mutable Mutex mutex_;
  absl::flat_hash_set<PlacesId> ids_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::service
