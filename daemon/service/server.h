// The server of the daemon: connections from all addresses, the service, health and reflection, limits. Start
// gives a running server or says which address failed and why. Shutdown may be called once, from any thread
// but gRPC's own.
#pragma once

#include <functional>
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
#include "daemon/service/tls_files.h"
#include "daemon/service/troubles.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"

namespace kvtide::service {

// What the service tells and asks whoever watches over the daemon, by the listener's thread.
struct ServerWatch {
  // What is wrong and stays so; the service adds what it notices itself. Never null.
  std::shared_ptr<Troubles> troubles = std::make_shared<Troubles>();
  // Called every few seconds, to look what else is wrong. May be empty.
  std::function<void()> look;
  // Told every few seconds when the server's certificate in use ends, where there is one. May be empty.
  std::function<void(absl::Time)> certificate_ends;
};

class Server {
 public:
  // Borrows the cache.
  static absl::StatusOr<std::unique_ptr<Server>> Start(KvCache* cache, const ServiceOptions& options,
                                                       ServerWatch watch = {});
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
  Server(Access access, std::shared_ptr<Clients> clients, ServerWatch watch)
      : watch_(std::move(watch)), connections_(std::move(access), std::move(clients)) {}
  // About once a second, by the listener's thread.
  void Tick(const ServiceOptions& options, const RefusedConnections& refused);
  void CheckCertificate(const ServiceOptions& options);

  const ServerWatch watch_;
  std::vector<std::unique_ptr<AddressClaim>> claims_;
  std::unique_ptr<TlsFiles> tls_;  // null: no TLS. gRPC reads them as long as it is there
  uint64_t ticks_ = 0;
  bool serves_ = true;
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
