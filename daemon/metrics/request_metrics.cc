#include "daemon/metrics/request_metrics.h"

#include <algorithm>
#include <cstring>

#include "daemon/metrics/metrics.h"

namespace kvtide::metrics {
namespace {

constexpr const char* kCodeNames[kCodes] = {
    "OK",        "CANCELLED",       "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS",  "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",    "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED",
};

// From a shared word away (25 us) to what only a stuck daemon takes.
const prometheus::Histogram::BucketBoundaries kSeconds = {25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3,
                                                          5e-3,  10e-3, 25e-3,  50e-3,  0.1,    0.25, 0.5,
                                                          1,     2.5,   5,      10,     30};

}  // namespace

const char* CodeName(int code) { return code >= 0 && code < kCodes ? kCodeNames[code] : "UNKNOWN"; }

RequestMetrics::RequestMetrics(prometheus::Registry* registry) {
  auto& requests =
      prometheus::BuildCounter()
          .Name("kvtide_rpc_requests_total")
          .Help("Finished calls by method and status code; those inside a session count like others.")
          .Register(*registry);
  auto& seconds = prometheus::BuildHistogram()
                      .Name("kvtide_rpc_duration_seconds")
                      .Help("Time from a call's arrival to its answer, by method.")
                      .Register(*registry);
  auto& request_bytes = prometheus::BuildCounter()
                            .Name("kvtide_rpc_received_bytes_total")
                            .Help("Bytes of requests, by method.")
                            .Register(*registry);
  auto& response_bytes = prometheus::BuildCounter()
                             .Name("kvtide_rpc_sent_bytes_total")
                             .Help("Bytes of answers, by method.")
                             .Register(*registry);
  const auto make = [&](const std::string& name) {
    Method method;
    for (int code = 0; code < kCodes; ++code) {
      method.requests[code] = &requests.Add({{"method", name}, {"code", CodeName(code)}});
    }
    if (name != "Session") method.seconds = &seconds.Add({{"method", name}}, kSeconds);
    method.request_bytes = &request_bytes.Add({{"method", name}});
    method.response_bytes = &response_bytes.Add({{"method", name}});
    return method;
  };
  for (const char* name : kMethods) methods_.emplace(name, make(name));
  other_ = make("other");
}

void RequestMetrics::Record(const char* method, int code, absl::Duration duration, int64_t request_bytes,
                            int64_t response_bytes) {
  const auto found = methods_.find(absl::string_view(method));
  const Method& entry = found == methods_.end() ? other_ : found->second;
  constexpr int kUnknown = 2;
  entry.requests[code >= 0 && code < kCodes ? code : kUnknown]->Increment();
  if (entry.seconds != nullptr) entry.seconds->Observe(std::max(0.0, absl::ToDoubleSeconds(duration)));
  entry.request_bytes->Increment(static_cast<double>(std::max<int64_t>(0, request_bytes)));
  entry.response_bytes->Increment(static_cast<double>(std::max<int64_t>(0, response_bytes)));
}

}  // namespace kvtide::metrics
