#include "daemon/metrics/metrics_endpoint.h"

#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "prometheus/exposer.h"

namespace kvtide::metrics {

absl::StatusOr<std::unique_ptr<MetricsEndpoint>> MetricsEndpoint::Start(
    const std::string& address, std::vector<std::shared_ptr<prometheus::Collectable>> sources) {
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--metrics-address \"", address, "\" is no address; use host:port or off"));
  }
  std::unique_ptr<MetricsEndpoint> endpoint(new MetricsEndpoint);
  endpoint->sources_ = std::move(sources);
  try {
    endpoint->exposer_ = std::make_unique<prometheus::Exposer>(address, 2);
    for (const auto& source : endpoint->sources_) endpoint->exposer_->RegisterCollectable(source, "/metrics");
    const std::vector<int> ports = endpoint->exposer_->GetListeningPorts();
    if (ports.empty()) return absl::UnavailableError(absl::StrCat("no port for metrics at ", address));
    endpoint->address_ = absl::StrCat(address.substr(0, colon + 1), ports.front());
  } catch (const std::exception& error) {
    return absl::UnavailableError(
        absl::StrCat("cannot serve metrics at ", address, " (", error.what(),
                     "): address in use or not ours; choose another --metrics-address, or off"));
  }
  return endpoint;
}

MetricsEndpoint::~MetricsEndpoint() = default;

}  // namespace kvtide::metrics
