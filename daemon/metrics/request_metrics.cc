#include "daemon/metrics/request_metrics.h"

#include "absl/status/status.h"

namespace kvtide::metrics {
namespace {

// From a metadata call on a Unix socket (50 us) to a prefill of many thousand tokens.
prometheus::Histogram::BucketBoundaries Buckets() {
  return {25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3,
          25e-3, 50e-3, 0.1,    0.25,   0.5,    1,    2.5,    5,    10};
}

}  // namespace

RequestMetrics::RequestMetrics() : registry_(std::make_shared<prometheus::Registry>()) {
  requests_ = &prometheus::BuildCounter()
                   .Name("kvtide_rpc_requests_total")
                   .Help("Calls by method and status code; Session counts streams when they end.")
                   .Register(*registry_);
  durations_ = &prometheus::BuildHistogram()
                    .Name("kvtide_rpc_duration_seconds")
                    .Help("Time from the arrival of a call to its answer, by method.")
                    .Register(*registry_);
  received_ = &prometheus::BuildCounter()
                   .Name("kvtide_rpc_received_bytes_total")
                   .Help("Bytes of requests, by method.")
                   .Register(*registry_);
  sent_ = &prometheus::BuildCounter()
               .Name("kvtide_rpc_sent_bytes_total")
               .Help("Bytes of answers, by method.")
               .Register(*registry_);
}

void RequestMetrics::Record(const std::string& method, int code, double seconds, int64_t request_bytes,
                            int64_t response_bytes) {
  const size_t slot =
      code >= 0 && code < static_cast<int>(kCodes) ? static_cast<size_t>(code) : 2;  // 2 = UNKNOWN
  prometheus::Counter* requests = nullptr;
  Method found;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    Method& entry = methods_[method];
    if (entry.duration == nullptr) {
      entry.duration = &durations_->Add({{"method", method}}, Buckets());
      entry.received = &received_->Add({{"method", method}});
      entry.sent = &sent_->Add({{"method", method}});
    }
    if (entry.requests[slot] == nullptr) {
      entry.requests[slot] = &requests_->Add(
          {{"method", method}, {"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(slot))}});
    }
    requests = entry.requests[slot];
    found = entry;
  }
  requests->Increment();
  // A session lasts as long as its client; its calls are recorded one by one.
  if (method != "Session") found.duration->Observe(seconds);
  found.received->Increment(static_cast<double>(request_bytes));
  found.sent->Increment(static_cast<double>(response_bytes));
}

}  // namespace kvtide::metrics
