// The HTTP endpoint that Prometheus scrapes: /metrics on one address, served by threads of its own until it
// is destroyed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "prometheus/collectable.h"

namespace prometheus {
class Exposer;
}

namespace kvtide::metrics {

class MetricsEndpoint {
 public:
  // `address`: "127.0.0.1:9464"; port 0 = any. Unavailable says that the port is taken and what to do.
  static absl::StatusOr<std::unique_ptr<MetricsEndpoint>> Start(
      const std::string& address, std::vector<std::shared_ptr<prometheus::Collectable>> sources);
  ~MetricsEndpoint();

  // "127.0.0.1:9464", with the port that is really used.
  const std::string& address() const { return address_; }

 private:
  MetricsEndpoint() = default;
  std::string address_;
  std::vector<std::shared_ptr<prometheus::Collectable>> sources_;  // the exposer only borrows them
  std::unique_ptr<prometheus::Exposer> exposer_;
};

}  // namespace kvtide::metrics
