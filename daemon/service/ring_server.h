// The shared-memory way of kvtided: lets clients of this host in (daemon/ring/handshake.h), gives each an
// arena and a thread that serves what comes through its ring. One more thread accepts, and watches the
// connections: when one ends, for whatever reason, the client's calls are cancelled, its sequences closed and
// its arena freed.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/ring/handshake.h"
#include "daemon/service/ring_session.h"
#include "daemon/service/service_options.h"

namespace kvtide::service {

class RingServer {
 public:
  struct Options {
    std::vector<int> sockets;  // that listen, non-blocking; borrowed
    uint64_t generation = 0;   // of the pool: another one in every process
    SharedMemoryOptions limits;
    Access access;
    const KvCache* cache = nullptr;  // whose first tier admins may map
    bool host_sharing = false;       // and its tier of host memory, for reading
    std::shared_ptr<ServiceGauges> gauges;
  };
  // Borrows the service.
  RingServer(KvCacheService* service, Options options);
  // As Stop.
  ~RingServer();
  RingServer(const RingServer&) = delete;
  RingServer& operator=(const RingServer&) = delete;

  // Lets nobody in any more, cancels what is under way and waits until every client's thread has ended.
  void Stop();

 private:
  class Client;
  struct Guest;

  void Watch();
  void Accept(int listening);
  // Takes what a guest says; false: it is to be forgotten, let in or not.
  bool Hear(Guest* guest);
  absl::Status LetIn(Guest* guest);
  // The memory that a client may map, and the descriptors that go with it; borrowed.
  absl::Status SharePool(const Identity& identity, ring::PoolSlabs* slabs, std::vector<int>* fds) const;
  // The same for the tier of host memory; it says which one that is, or why not.
  absl::StatusOr<int> ShareHost(const Identity& identity, ring::HostTier* tier, int* fd) const;
  // Clients whose threads have ended.
  void Sweep();

  KvCacheService* const service_;
  const Options options_;
  const size_t most_pollers_;
  std::atomic<size_t> pollers_{0};  // threads that look at a ring instead of sleeping
  uint64_t last_client_ = 0;
  uint64_t bytes_ = 0;  // of all arenas
  std::list<Guest> guests_;
  std::list<std::unique_ptr<Client>> clients_;
  int stop_ = -1;  // an eventfd
  std::thread watcher_;
};

}  // namespace kvtide::service
