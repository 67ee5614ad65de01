// The connections that are open: who is at the other end, and what each holds. gRPC serves a descriptor that
// it was handed under the peer name "fd:N", and with TLS under its address; that is how a call finds its
// connection. Thread-safe.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "daemon/service/access.h"
#include "daemon/service/clients.h"
#include "daemon/service/memory_budget.h"
#include "daemon/service/read_turns.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

struct Connection {
  // Who is at the other end, by the kind of the connection alone; or why nobody is served there.
  absl::StatusOr<IdentityPtr> identity = absl::UnavailableError("the connection has gone");
  uint64_t number = 0;  // 1, 2, ... in order of arrival; the caller's place in fair queues
  int fd = -1;          // its descriptor, for as long as it is open
  bool tcp = false;
  std::string name = "a closed connection";  // "unix:uid=1000,pid=4711" or "127.0.0.1:53412"
  std::shared_ptr<Client> client;            // its counts; null = it has gone
  std::atomic<int> calls_under_way{0};       // as ServiceGauges counts them
  MemoryBudget::Account memory;
  ReadTurns turns;
};

// Who is at the other end of a socket: "unix:uid=1000,pid=4711" or "127.0.0.1:53412".
std::string NameOfPeer(int fd);

class Connections {
 public:
  // `clients` is told of them; null = nobody is.
  explicit Connections(Access access = {}, std::shared_ptr<Clients> clients = nullptr)
      : access_(std::move(access)), clients_(std::move(clients)) {}
  // The connection that was accepted as descriptor `fd`; it takes the place of an earlier one that is gone.
  std::shared_ptr<Connection> Add(int fd);
  // By the peer name of a call. A call whose connection has gone gets one that stands for all such.
  std::shared_ptr<Connection> Find(const std::string& peer) const;
  // Closes none of them: forgets one that was added and is refused after all.
  void Forget(int fd);
  // Forgets those whose descriptor is closed or another socket's by now; how many are left.
  size_t Sweep();
  // Whether the other end has closed it, or it is closed here.
  bool HasEnded(const Connection& connection) const;
  size_t size() const { return size_.load(std::memory_order_relaxed); }
  // Of a tenant, as its sockets tell; those that say who they are with a token or certificate do not count.
  size_t CountOf(const std::string& tenant) const;
  // As opened by Add since the start.
  uint64_t accepted() const;

 private:
  struct Entry {
    std::shared_ptr<Connection> connection;
    ino_t socket = 0;
  };
  const Access access_;
  const std::shared_ptr<Clients> clients_;
  void Erase(int fd) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  mutable Mutex mutex_;
  absl::flat_hash_map<int, Entry> open_ ABSL_GUARDED_BY(mutex_);
  // By what gRPC calls the peer of a connection that it was handed with TLS: "ipv4:127.0.0.1:53412".
  absl::flat_hash_map<std::string, int> tcp_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, size_t> of_tenants_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_ ABSL_GUARDED_BY(mutex_) = 0;
  std::atomic<size_t> size_{0};  // of open_
  const std::shared_ptr<Connection> gone_ = std::make_shared<Connection>();
};

}  // namespace kvtide::service
