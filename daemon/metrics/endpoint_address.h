// Addresses of the metrics endpoint: host:port to numbers, and why one cannot be bound.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvtide::metrics {

struct EndpointAddress {
  std::string host;  // numeric; "::1" without brackets
  int port = 0;
  // "127.0.0.1:9464", "[::1]:9464".
  std::string Text() const;
};

// Resolves the host. InvalidArgument says what an address looks like.
absl::StatusOr<EndpointAddress> ParseEndpointAddress(const std::string& text);

// A socket that listens there and does not wait, the caller's. Unavailable (in use), PermissionDenied,
// InvalidArgument (not an address of this host).
absl::StatusOr<int> Listen(const EndpointAddress& address);

}  // namespace kvtide::metrics
