// What scrapers ask, as bytes of HTTP/1: a request without a body at a time. Pure functions.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace kvtide::metrics {

struct HttpRequest {
  std::string method, path;  // "GET", "/metrics", without what follows a '?'
  bool keeps_alive = false;  // the connection stays open for the next one
  bool takes_gzip = false;   // the answer may be compressed
};

constexpr size_t kMostRequestBytes = 16 << 10;

// Takes the first request out of `bytes`; none: it has not come whole. InvalidArgument for what is no request
// or has a body, ResourceExhausted for one that is longer than kMostRequestBytes.
absl::StatusOr<std::optional<HttpRequest>> TakeHttpRequest(std::string* bytes);

}  // namespace kvtide::metrics
