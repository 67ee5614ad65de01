// The HTTP server of /metrics, by CivetWeb. Its threads ask the kernel for short turns, so that a scrape does
// not wait for whole turns of the threads that attend (Linux 6.12 and later; nothing is taken from those).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "daemon/metrics/endpoint_address.h"

namespace kvtide::metrics {

class Endpoint {
 public:
  // `text` is called for every scrape, by several threads at once when there are several. Port 0 is any free
  // one. Unavailable for a port in use, InvalidArgument for no address of this host, PermissionDenied.
  static absl::StatusOr<std::unique_ptr<Endpoint>> Start(const EndpointAddress& address,
                                                         std::function<std::string()> text);
  // After it no `text` runs.
  ~Endpoint();
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  int port() const;

 private:
  struct Server;
  explicit Endpoint(std::unique_ptr<Server> server);
  std::unique_ptr<Server> server_;
};

// The text compressed by gzip, quickly rather than well: a tenth of it.
std::string Gzip(const std::string& text);

}  // namespace kvtide::metrics
