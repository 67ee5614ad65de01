// The HTTP server of /metrics: one thread that looks after all connections, so that no number of those that
// say nothing, or take nothing, keeps a scrape waiting. When there are as many as may be, the one that was
// served longest ago makes way for the next. The thread asks the kernel for short turns, so that a scrape
// does not wait for whole turns of the threads that attend (Linux 6.12 and later; nothing is taken from
// those).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/metrics/endpoint_address.h"

namespace kvtide::metrics {

class Endpoint {
 public:
  struct Limits {
    size_t connections = 64;
    // How long a request may take to come and an answer to be taken, and how long a connection may rest
    // between two requests.
    absl::Duration patience = absl::Seconds(10), rest = absl::Seconds(90);
  };
  // `text` is called for every scrape, by one thread. Port 0 is any free one. Unavailable for a port in use,
  // InvalidArgument for no address of this host, PermissionDenied.
  static absl::StatusOr<std::unique_ptr<Endpoint>> Start(const EndpointAddress& address,
                                                         std::function<std::string()> text, Limits limits);
  static absl::StatusOr<std::unique_ptr<Endpoint>> Start(const EndpointAddress& address,
                                                         std::function<std::string()> text) {
    return Start(address, std::move(text), Limits());
  }
  // After it no `text` runs.
  ~Endpoint();
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  int port() const;

 private:
  class Server;
  explicit Endpoint(std::unique_ptr<Server> server);
  std::unique_ptr<Server> server_;
};

// The text compressed by gzip, quickly rather than well: a tenth of it.
std::string Gzip(const std::string& text);

}  // namespace kvtide::metrics
