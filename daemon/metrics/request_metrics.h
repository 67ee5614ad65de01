// Counts, latencies and bytes of calls. Every (method, code) is there from the start with 0, so that a rate
// sees the first failure. Tenants have series of their own as they come, up to kMostTenants; the others share
// one, and so do callers that are nobody. Recording allocates nothing but for the first call of a tenant.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "daemon/metrics/metrics.h"
#include "kernels/base/mutex.h"
#include "prometheus/counter.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace kvtide::metrics {

constexpr int kCodes = 17;
constexpr size_t kMostTenants = 32;
// "OK", "RESOURCE_EXHAUSTED"; "UNKNOWN" for codes that gRPC does not have.
const char* CodeName(int code);

class RequestMetrics {
 public:
  explicit RequestMetrics(prometheus::Registry* registry);
  void Record(const CallSample& call);
  // Metrics::RecordLookup.
  void RecordLookup(std::string_view tenant, std::string_view unit, std::string_view tier, uint64_t count);

 private:
  struct Method {
    std::array<prometheus::Counter*, kCodes> requests{};
    prometheus::Histogram* seconds = nullptr;  // null for streams
    prometheus::Counter* request_bytes = nullptr;
    prometheus::Counter* response_bytes = nullptr;
  };
  struct Tenant {
    prometheus::Counter *answered = nullptr, *failed = nullptr, *request_bytes = nullptr,
                        *response_bytes = nullptr;
    prometheus::Histogram* seconds = nullptr;
    std::array<prometheus::Counter*, kRefusals> refused{};
  };
  // The label that a tenant's series have.
  std::string LabelOf(std::string_view tenant) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Made where it is not there yet.
  const Tenant& Of(std::string_view tenant) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  prometheus::Registry* const registry_;
  absl::flat_hash_map<std::string, Method> methods_;  // never changes after the constructor
  Method other_;
  std::array<prometheus::Counter*, kRefusals> refused_{};
  std::array<prometheus::Histogram*, 3> phases_{};  // receive, queue, serve
  Mutex mutex_;
  absl::flat_hash_map<std::string, Tenant> tenants_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::metrics
