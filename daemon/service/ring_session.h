// A client of the shared-memory way as the service sees it: a session, whose messages come one at a time from
// a thread that waits for the answer. The same handlers, turns, limits and reports as for calls over gRPC;
// what is created here is closed with it.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "daemon/service/connections.h"
#include "daemon/service/kv_cache_service.h"
#include "daemon/service/places_in_use.h"
#include "daemon/service/tensor.h"
#include "daemon/service/verbs.h"
#include "kernels/base/cancellation.h"
#include "kvtide/v1/kv_cache_service.pb.h"

namespace kvtide::service {

class RingSession {
 public:
  // Borrows the service. Tensors of messages may lie in `tensors`; answers have at most `max_answer_bytes`.
  // `maps_pool`: the client writes and reads blocks itself. `host_tier`: that it has mapped, to read what it
  // loads; -1 = none.
  RingSession(KvCacheService* service, std::shared_ptr<Connection> connection, const TensorMemory& tensors,
              int64_t max_answer_bytes, bool maps_pool, int host_tier);
  ~RingSession();
  RingSession(const RingSession&) = delete;
  RingSession& operator=(const RingSession&) = delete;

  // Serves one message, `bytes` of a SessionRequest, in this thread if a thread of its lane is free, else in
  // its turn. `answer` gets what came of it, errors too.
  void Serve(const std::string& bytes, absl::Duration timeout, v1::SessionResponse* answer);

  // From any thread: the client has gone; a call under way is cancelled.
  void Cancel() { cancellation_.Cancel(); }
  // From any thread: the daemon shuts down; a call that may take long is cancelled.
  void CancelIfBulk() {
    if (bulk_.load(std::memory_order_relaxed)) cancellation_.Cancel();
  }
  // Loads in place that the client has not given back.
  bool reads_in_place() const { return !places_.empty(); }
  // Why the client is let go, for the report.
  void set_end(const absl::Status& status) { end_ = status; }

 private:
  class Turn;
  Way way() const { return maps_pool_ ? Way::kDirect : Way::kSharedMemory; }
  // In the log: of its calls that have no names of their own, too.
  std::string Name() const;
  void PinTensors(const v1::SessionRequest& request);
  absl::Status Run(const v1::SessionRequest& request, absl::Duration timeout, v1::SessionResponse* answer,
                   const char** method, SequenceId* sequence);

  KvCacheService* const service_;
  const std::shared_ptr<Connection> connection_;
  const TensorMemory tensors_;
  const int64_t max_answer_bytes_;
  const bool maps_pool_;
  const absl::Time opened_;
  Cancellation cancellation_;
  std::atomic<bool> bulk_{false};
  SessionOwned owned_;
  PlacesInUse places_;
  uint64_t number_ = 0;    // of messages
  absl::Duration waited_;  // of the call under way, for its turn,
  absl::Duration locked_;  // and for the cache's mutex
  absl::Status end_;
  bool asked_to_pin_ = false;
  std::shared_ptr<void> pinned_;  // the tensors, for devices
};

}  // namespace kvtide::service
