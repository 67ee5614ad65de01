// The gRPC server of the daemon: the service on all addresses, health and reflection, limits. Start gives a
// running server or says which address failed and why. Shutdown may be called once, from any thread but
// gRPC's own.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/service/address.h"
#include "daemon/service/kv_cache_service.h"
#include "grpcpp/server.h"

namespace kvtide::service {

class Server {
 public:
  // Borrows the cache.
  static absl::StatusOr<std::unique_ptr<Server>> Start(KvCache* cache, const ServiceOptions& options);
  ~Server();

  // The addresses as they are, with the port that a port 0 became.
  const std::vector<std::string>& addresses() const { return addresses_; }

  // Health says NOT_SERVING, new calls are refused, calls under way have `grace` to end; then all is
  // cancelled. Returns when no call uses the cache any more.
  void Shutdown(absl::Duration grace);

 private:
  Server() = default;

  std::vector<std::unique_ptr<AddressClaim>> claims_;
  std::unique_ptr<KvCacheService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::vector<std::string> addresses_;
};

}  // namespace kvtide::service
