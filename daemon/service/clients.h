// Who is connected, by which way, and what each has asked for. Thread-safe, and cheap: a call adds to its
// way's counters and to its client's.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "daemon/cache/call/identity.h"
#include "daemon/service/call_report.h"
#include "kernels/base/mutex.h"
#include "kvtide/v1/server.pb.h"

namespace kvtide::service {

// Since the start of the daemon, or of the connection. Bytes are those of messages: tensors that lie in
// shared memory, and blocks that a client writes itself, are not carried.
struct Traffic {
  int64_t calls = 0;  // that have ended, well or not; sessions count by their calls
  int64_t steps = 0;  // of them those that ended a step
  int64_t received_bytes = 0, sent_bytes = 0;
};

// A client for as long as somebody holds it.
class Client {
 public:
  Client(Way way, std::string name, std::string tenant);

  Way way() const { return way_; }
  // Of the last call, or as its socket tells; and the rest as of now.
  void ToProto(absl::Time now, v1::ClientStats* proto) const;
  std::string tenant() const;
  int64_t calls() const;

 private:
  friend class Clients;
  void Count(const CallReport& call);

  const Way way_;
  const std::string name_;
  const absl::Time since_;
  mutable Mutex mutex_;
  std::string tenant_ ABSL_GUARDED_BY(mutex_);
  absl::Time last_ ABSL_GUARDED_BY(mutex_);
  Traffic traffic_ ABSL_GUARDED_BY(mutex_);
};

class Clients {
 public:
  // Most clients that ToProto names.
  static constexpr size_t kMostShown = 64;

  // Counts as connected for as long as the answer is held.
  std::shared_ptr<Client> Add(Way way, std::string name, std::string tenant);
  // A call has ended; `client` may be null, of a connection that has gone.
  void Count(const CallReport& call, Client* client);

  struct OfWay {
    int64_t connected = 0;
    Traffic traffic;
  };
  std::array<OfWay, kWays> Ways() const;
  // All ways, and the clients that the caller may see, those with most calls first.
  void ToProto(const Identity& caller, v1::GetStatsResponse* proto) const;

 private:
  struct Totals {
    std::atomic<int64_t> calls{0}, steps{0}, received_bytes{0}, sent_bytes{0};
  };
  // Those that are held; forgets the others.
  std::vector<std::shared_ptr<Client>> Connected() const;

  std::array<Totals, kWays> totals_;
  mutable Mutex mutex_;
  mutable std::vector<std::weak_ptr<Client>> clients_ ABSL_GUARDED_BY(mutex_);
  size_t swept_ ABSL_GUARDED_BY(mutex_) = 0;  // were connected when Add last looked
};

}  // namespace kvtide::service
