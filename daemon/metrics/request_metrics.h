// Counts, latencies and bytes of calls. Every (method, code) is there from the start with 0, so that a rate
// sees the first failure. Recording takes no lock of its own and allocates nothing.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "prometheus/counter.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace kvtide::metrics {

constexpr int kCodes = 17;
// "OK", "RESOURCE_EXHAUSTED"; "UNKNOWN" for codes that gRPC does not have.
const char* CodeName(int code);

class RequestMetrics {
 public:
  explicit RequestMetrics(prometheus::Registry* registry);
  void Record(const char* method, int code, absl::Duration duration, int64_t request_bytes,
              int64_t response_bytes);

 private:
  struct Method {
    std::array<prometheus::Counter*, kCodes> requests{};
    prometheus::Histogram* seconds = nullptr;  // null for streams
    prometheus::Counter* request_bytes = nullptr;
    prometheus::Counter* response_bytes = nullptr;
  };
  absl::flat_hash_map<std::string, Method> methods_;  // never changes after the constructor
  Method other_;
};

}  // namespace kvtide::metrics
