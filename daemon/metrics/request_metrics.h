// Counts and latencies of calls, by method and status code. Record costs about 0.1 us: series are looked up
// once and kept. Thread-safe.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "prometheus/collectable.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace kvtide::metrics {

class RequestMetrics {
 public:
  RequestMetrics();

  // `code`: a gRPC status code, 0..16.
  void Record(const std::string& method, int code, double seconds, int64_t request_bytes,
              int64_t response_bytes);
  std::shared_ptr<prometheus::Collectable> collectable() const { return registry_; }

 private:
  static constexpr size_t kCodes = 17;
  struct Method {
    std::array<prometheus::Counter*, kCodes> requests{};  // made when a code first occurs
    prometheus::Histogram* duration = nullptr;
    prometheus::Counter* received = nullptr;
    prometheus::Counter* sent = nullptr;
  };

  std::shared_ptr<prometheus::Registry> registry_;
  prometheus::Family<prometheus::Counter>* requests_;
  prometheus::Family<prometheus::Histogram>* durations_;
  prometheus::Family<prometheus::Counter>* received_;
  prometheus::Family<prometheus::Counter>* sent_;
  std::mutex mutex_;
  std::map<std::string, Method> methods_;  // guarded by mutex_
};

}  // namespace kvtide::metrics
