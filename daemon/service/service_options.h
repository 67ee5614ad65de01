// What the service needs to know beside the cache. Checked by the daemon's configuration.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "daemon/service/convert.h"

namespace kvtide::service {

// Told after every call, from any thread; must be quick. `method` is a string literal, `code` a gRPC status
// code.
struct CallReport {
  const char* method = "";
  int code = 0;
  absl::Duration duration;
  int64_t request_bytes = 0, response_bytes = 0;
};

struct ServiceOptions {
  std::string version;
  SequenceDefaults defaults;
  std::vector<std::string> listen;  // see address.h; at least one
  int64_t max_message_bytes = int64_t{64} << 20;
  int threads = 2;
  size_t max_queued_calls = 1024;
  std::function<void(const CallReport&)> report;  // may be empty
};

}  // namespace kvtide::service
