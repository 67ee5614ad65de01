// The standard gRPC health service (grpc.health.v1.Health, Check and Watch) on the daemon's own RPC loop, as
// bytes. gRPC's own implementation brings two threads of its callback interface with it, which take turns
// with the loop at the sockets of all calls.
#pragma once

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "daemon/service/rpc_loop.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

class Health {
 public:
  // As the protocol numbers them.
  enum class Status : uint8_t { kServing = 1, kNotServing = 2, kServiceUnknown = 3 };

  // Takes a call that has arrived, if it is one of the health service. To be destroyed after the server whose
  // calls it takes.
  bool Begin(Rpc* rpc);
  // Of the server ("") and of kvtide.v1.KvCacheService alike; serving at first. Those who watch are told.
  void SetServing(bool serving);

 private:
  class CheckCall;
  class WatchCall;

  Mutex mutex_;
  Status status_ ABSL_GUARDED_BY(mutex_) = Status::kServing;
  absl::flat_hash_set<WatchCall*> watches_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::service
