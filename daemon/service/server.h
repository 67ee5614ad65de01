// The server of the daemon: connections from all addresses, the service, health and reflection, limits. Start
// gives a running server or says which address failed and why. Shutdown may be called once, from any thread
// but gRPC's own.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/service/address.h"
#include "daemon/service/connections.h"
#include "daemon/service/descriptors.h"
#include "daemon/service/health.h"
#include "daemon/service/kv_cache_service.h"
#include "daemon/service/listener.h"
#include "daemon/service/ring_server.h"
#include "daemon/service/rpc_loop.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"

namespace kvtide::service {

class Server {
 public:
  // Borrows the cache.
  static absl::StatusOr<std::unique_ptr<Server>> Start(KvCache* cache, const ServiceOptions& options);
  // Shuts down without grace, if that has not happened; no call may be stuck.
  ~Server();

  // The addresses as they are, with the port that a port 0 became.
  const std::vector<std::string>& addresses() const { return addresses_; }

  // What the limit of open files has no room for, and which limit would do; empty = nothing.
  const std::string& shortage() const { return shortage_; }

  // Health says NOT_SERVING, calls that have not begun are answered UNAVAILABLE, calls under way have `grace`
  // to end; then they are cancelled, and have `patience` to notice. True: no call uses the cache any more.
  // False: some backend did not come back; the cache must stay, and the process can only be ended.
  bool Shutdown(absl::Duration grace, absl::Duration patience);

 private:
  Server(Access access, std::shared_ptr<Clients> clients)
      : connections_(std::move(access), std::move(clients)) {}
  void Tick(const ServiceOptions& options, uint64_t refused);

  std::vector<std::unique_ptr<AddressClaim>> claims_;
  Connections connections_;
  std::unique_ptr<KvCacheService> service_;
  std::unique_ptr<Health> health_;
  std::unique_ptr<grpc::Service> description_;  // for reflection: what the service is called and has
  std::unique_ptr<RpcLoop> loop_;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> secure_;  // of TCP with TLS; null = none
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<RingServer> rings_;
  std::vector<std::string> addresses_;
  std::string shortage_;
};

}  // namespace kvtide::service
