// What the service needs to know beside the cache. Checked by the daemon's configuration.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
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
  // Calls being handled or waiting, idle sessions aside; shared with whoever shows the number.
  std::shared_ptr<std::atomic<int64_t>> calls_under_way = std::make_shared<std::atomic<int64_t>>(0);
};

}  // namespace kvtide::service
