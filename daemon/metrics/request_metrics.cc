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

// Fewer, since there are many tenants.
const prometheus::Histogram::BucketBoundaries kTenantSeconds = {1e-4, 1e-3, 1e-2, 0.1, 1, 10};

}  // namespace

const char* CodeName(int code) { return code >= 0 && code < kCodes ? kCodeNames[code] : "UNKNOWN"; }

RequestMetrics::RequestMetrics(prometheus::Registry* registry) : registry_(registry) {
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
  auto& refused =
      prometheus::BuildCounter()
          .Name("kvtide_refused_calls_total")
          .Help(
              "Calls that were refused and changed nothing, by reason; what failed in the daemon and what "
              "clients gave up is not among them.")
          .Register(*registry);
  for (size_t i = 0; i < kRefusals; i++) refused_[i] = &refused.Add({{"reason", kRefusalNames[i]}});
  auto& phases = prometheus::BuildHistogram()
                     .Name("kvtide_rpc_phase_seconds")
                     .Help(
                         "Where the time of calls went: until their request was there, until a thread took "
                         "them, and the rest.")
                     .Register(*registry);
  constexpr const char* kPhases[] = {"receive", "queue", "serve"};
  for (size_t i = 0; i < phases_.size(); i++) phases_[i] = &phases.Add({{"phase", kPhases[i]}}, kSeconds);
}

std::string RequestMetrics::LabelOf(std::string_view tenant) const {
  if (tenant.empty()) return "(nobody)";
  std::string name(tenant);
  // An admin may give a tenant any name.
  std::replace_if(
      name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; },
      '?');
  return tenants_.size() < kMostTenants || tenants_.contains(name) ? name : "(others)";
}

const RequestMetrics::Tenant& RequestMetrics::Of(std::string_view tenant) {
  const std::string name = LabelOf(tenant);
  Tenant& made = tenants_[name];
  if (made.seconds != nullptr) return made;
  // Registering a name again gives the family that is there.
  auto& calls = prometheus::BuildCounter()
                    .Name("kvtide_tenant_calls_total")
                    .Help("Finished calls of the tenant, answered or failed; sessions count by their calls.")
                    .Register(*registry_);
  made.answered = &calls.Add({{"tenant", name}, {"outcome", "answered"}});
  made.failed = &calls.Add({{"tenant", name}, {"outcome", "failed"}});
  made.request_bytes = &prometheus::BuildCounter()
                            .Name("kvtide_tenant_received_bytes_total")
                            .Help("Bytes of requests of the tenant.")
                            .Register(*registry_)
                            .Add({{"tenant", name}});
  made.response_bytes = &prometheus::BuildCounter()
                             .Name("kvtide_tenant_sent_bytes_total")
                             .Help("Bytes of answers to the tenant.")
                             .Register(*registry_)
                             .Add({{"tenant", name}});
  made.seconds = &prometheus::BuildHistogram()
                      .Name("kvtide_tenant_call_seconds")
                      .Help("Time from a call's arrival to its answer, by tenant.")
                      .Register(*registry_)
                      .Add({{"tenant", name}}, kTenantSeconds);
  auto& refused = prometheus::BuildCounter()
                      .Name("kvtide_tenant_refused_calls_total")
                      .Help("Calls of the tenant that were refused and changed nothing, by reason.")
                      .Register(*registry_);
  for (size_t i = 0; i < kRefusals; i++)
    made.refused[i] = &refused.Add({{"tenant", name}, {"reason", kRefusalNames[i]}});
  return made;
}

void RequestMetrics::RecordLookup(std::string_view tenant, std::string_view unit, std::string_view tier,
                                  uint64_t count) {
  prometheus::Counter* counter = nullptr;
  {
    const MutexLock lock(mutex_);
    Of(tenant);
    counter = &prometheus::BuildCounter()
                   .Name("kvtide_tenant_lookups_total")
                   .Help(
                       "What lookups of the tenant found, by tier, and what they did not (found_in none): "
                       "blocks by "
                       "key, and tokens of prefixes.")
                   .Register(*registry_)
                   .Add({{"tenant", LabelOf(tenant)},
                         {"unit", std::string(unit)},
                         {"found_in", tier.empty() ? "none" : std::string(tier)}});
  }
  counter->Increment(static_cast<double>(count));
}

void RequestMetrics::Record(const CallSample& call) {
  const auto found = methods_.find(absl::string_view(call.method));
  const Method& entry = found == methods_.end() ? other_ : found->second;
  constexpr int kUnknown = 2;
  const double seconds = std::max(0.0, absl::ToDoubleSeconds(call.duration));
  const auto request_bytes = static_cast<double>(std::max<int64_t>(0, call.request_bytes));
  const auto response_bytes = static_cast<double>(std::max<int64_t>(0, call.response_bytes));
  entry.requests[call.code >= 0 && call.code < kCodes ? call.code : kUnknown]->Increment();
  if (call.refusal.has_value()) refused_[static_cast<size_t>(*call.refusal)]->Increment();
  entry.request_bytes->Increment(request_bytes);
  entry.response_bytes->Increment(response_bytes);
  if (entry.seconds == nullptr) {  // a stream: its calls are told by themselves
    if (!call.refusal.has_value()) return;
    const MutexLock lock(mutex_);
    Of(call.tenant).refused[static_cast<size_t>(*call.refusal)]->Increment();
    return;
  }
  entry.seconds->Observe(seconds);
  const absl::Duration parts[] = {call.received, call.waited, call.duration - call.received - call.waited};
  for (size_t i = 0; i < phases_.size(); i++)
    phases_[i]->Observe(std::max(0.0, absl::ToDoubleSeconds(parts[i])));
  Tenant tenant;
  {
    const MutexLock lock(mutex_);
    tenant = Of(call.tenant);
  }
  (call.code == 0 ? tenant.answered : tenant.failed)->Increment();
  if (call.refusal.has_value()) tenant.refused[static_cast<size_t>(*call.refusal)]->Increment();
  tenant.request_bytes->Increment(request_bytes);
  tenant.response_bytes->Increment(response_bytes);
  tenant.seconds->Observe(seconds);
}

}  // namespace kvtide::metrics
