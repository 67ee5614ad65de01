#include "daemon/metrics/metrics.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/metrics/allocator_collector.h"
#include "daemon/metrics/cache_collector.h"
#include "daemon/metrics/endpoint.h"
#include "daemon/metrics/endpoint_address.h"
#include "daemon/metrics/family.h"
#include "daemon/metrics/gpu_collector.h"
#include "daemon/metrics/process_collector.h"
#include "daemon/metrics/request_metrics.h"
#include "daemon/metrics/serializer.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace kvtide::metrics {
namespace {

std::string Compiler() {
#if defined(__clang__)
  return absl::StrCat("clang ", __clang_major__, ".", __clang_minor__);
#else
  return absl::StrCat("gcc ", __GNUC__, ".", __GNUC_MINOR__);
#endif
}

void WriteWays(const std::vector<WayStats>& ways, FamilyWriter* writer) {
  writer->Gauge("kvtide_clients", "Clients that are connected, by the way by which they reach the daemon.");
  for (const WayStats& way : ways) writer->Sample(static_cast<double>(way.clients), {{"way", way.way}});
  const auto counter = [&](const char* name, const char* help, int64_t WayStats::*value) {
    writer->Counter(name, help);
    for (const WayStats& way : ways) writer->Sample(static_cast<double>(way.*value), {{"way", way.way}});
  };
  counter("kvtide_way_calls_total", "Calls that have ended, by way; sessions count by their calls.",
          &WayStats::calls);
  counter("kvtide_way_steps_total", "Steps that have ended, by way.", &WayStats::steps);
  counter("kvtide_way_received_bytes_total",
          "Bytes of requests, by way; tensors in shared memory are not carried and do not count.",
          &WayStats::received_bytes);
  counter("kvtide_way_sent_bytes_total",
          "Bytes of answers, by way; tensors in shared memory are not carried and do not count.",
          &WayStats::sent_bytes);
}

void WriteMemory(const std::vector<MemoryUse>& memory, FamilyWriter* writer) {
  writer->Gauge(
      "kvtide_memory_predicted_bytes",
      "What the planner's arithmetic and the limits say that memory is: blocks of open sequences where "
      "they rest, the process (the most), its share of all GPUs.");
  for (const MemoryUse& use : memory)
    writer->Sample(static_cast<double>(use.predicted_bytes), {{"part", use.part}});
  writer->Gauge("kvtide_memory_actual_bytes", "What memory is, by the same parts.");
  for (const MemoryUse& use : memory)
    writer->Sample(static_cast<double>(use.actual_bytes), {{"part", use.part}});
}

void WriteCalibrations(const CalibrationStats& stats, FamilyWriter* writer) {
  writer->Gauge("kvtide_calibrations", "Models whose keys are calibrated from traffic, by how far that is.")
      .Sample(static_cast<double>(stats.gathering), {{"state", "gathering"}})
      .Sample(static_cast<double>(stats.making), {{"state", "making"}})
      .Sample(static_cast<double>(stats.ready), {{"state", "ready"}})
      .Sample(static_cast<double>(stats.refused), {{"state", "refused"}});
  writer->Gauge("kvtide_calibration_memory_bytes", "Memory that is reserved for calibrations from traffic.")
      .Sample(static_cast<double>(stats.memory_bytes));
  writer
      ->Counter("kvtide_calibration_observed_seconds_total",
                "Time of the calls that calibrations from traffic looked at.")
      .Sample(stats.observed_seconds);
  writer
      ->Counter("kvtide_calibration_spent_seconds_total",
                "Time that they spent on it: copies of rows in the calls, sums in a thread of their own.")
      .Sample(stats.spent_seconds);
  writer
      ->Counter("kvtide_calibration_making_seconds_total",
                "Time that making and measuring their profiles took, once for each.")
      .Sample(stats.making_seconds);
}

void WriteService(const ServiceStats& stats, FamilyWriter* writer) {
  const auto gauge = [&](const char* name, const char* help, int64_t value) {
    writer->Gauge(name, help).Sample(static_cast<double>(value));
  };
  gauge("kvtide_calls_under_way", "Calls that have arrived and are not answered yet.", stats.calls_under_way);
  writer->Gauge("kvtide_queued_calls", "Calls that wait for a thread: bulk ones have threads of their own.")
      .Sample(static_cast<double>(stats.queued_calls), {{"lane", "prompt"}})
      .Sample(static_cast<double>(stats.queued_bulk_calls), {{"lane", "bulk"}});
  gauge("kvtide_connections", "Connections that are open.", stats.connections);
  gauge("kvtide_connections_limit", "Most connections that may be open.", stats.connections_limit);
  writer->Counter("kvtide_connections_accepted_total", "Connections that were taken.")
      .Sample(static_cast<double>(stats.connections_accepted));
  FamilyWriter& refused = writer->Counter("kvtide_connections_refused_total",
                                          "Connections that were not served: too many of all or of a tenant "
                                          "(quota), no file descriptor for them, "
                                          "plain HTTP/2 where TLS is asked for, or nothing said for 10 s.");
  for (const auto& [reason, count] : stats.connections_refused)
    refused.Sample(static_cast<double>(count), {{"reason", reason}});
  gauge("kvtide_call_memory_bytes", "Bytes of requests and answers of calls under way.",
        stats.call_memory_bytes);
  gauge("kvtide_call_memory_limit_bytes", "Most bytes of requests and answers; beyond it calls are refused.",
        stats.call_memory_limit);
  gauge("kvtide_memory_overhead_limit_bytes",
        "The most memory that the daemon takes beside its tiers in host memory, whatever clients do.",
        stats.memory_overhead_limit);
  gauge("kvtide_shared_memory_clients", "Clients that share memory with the daemon.",
        stats.shared_memory_clients);
  writer->Counter("kvtide_shared_memory_refused_total", "Clients that were refused shared memory.")
      .Sample(static_cast<double>(stats.shared_memory_refused));
  gauge("kvtide_shared_memory_bytes", "Sizes of the arenas of all clients; pages count as they are used.",
        stats.shared_memory_bytes);
  gauge("kvtide_shared_memory_limit_bytes", "Most bytes of all arenas; beyond it clients are refused.",
        stats.shared_memory_limit);
  if (stats.certificate_expires != 0)
    gauge("kvtide_server_certificate_expires_seconds",
          "When the server's certificate in use ends, in Unix time.", stats.certificate_expires);
  FamilyWriter& troubles = writer->Gauge("kvtide_trouble",
                                         "1: this is wrong and stays so until somebody mends it, the log has "
                                         "the words (trouble=); 0: it is not.");
  for (const auto& [what, there] : stats.troubles) troubles.Sample(there ? 1 : 0, {{"what", what}});
  WriteWays(stats.ways, writer);
  WriteMemory(stats.memory, writer);
  WriteCalibrations(stats.calibrations, writer);
}

std::vector<prometheus::Histogram*> WorkHistograms(const std::vector<std::string>& works,
                                                   prometheus::Registry* registry) {
  // From a small kernel to a copy of gigabytes.
  const prometheus::Histogram::BucketBoundaries seconds = {10e-6, 50e-6, 250e-6, 1e-3, 5e-3, 25e-3, 0.1, 1};
  auto& family =
      prometheus::BuildHistogram()
          .Name("kvtide_work_seconds")
          .Help(
              "Time of one piece of work of a backend: rows appended, blocks sealed, a layer attended, "
              "rows read back, a copy between tiers until it was seen to be done.")
          .Register(*registry);
  std::vector<prometheus::Histogram*> histograms;
  for (const std::string& work : works) histograms.push_back(&family.Add({{"work", work}}, seconds));
  return histograms;
}

// All of a scrape, in one order: build, cache, calls, GPUs, allocator, process.
class Everything {
 public:
  explicit Everything(MetricsOptions options)
      : options_(std::move(options)),
        requests_(&registry_),
        works_(WorkHistograms(options_.works, &registry_)),
        cache_(options_.stats),
        allocator_(ProcessMallctl()) {}

  RequestMetrics& requests() { return requests_; }
  void RecordWork(size_t work, absl::Duration time) {
    if (work < works_.size()) works_[work]->Observe(absl::ToDoubleSeconds(time));
  }

  std::vector<prometheus::MetricFamily> Collect() const {
    std::vector<prometheus::MetricFamily> families;
    FamilyWriter writer(&families);
    writer.Gauge("kvtide_build_info", "Version and build of the daemon.")
        .Sample(1, {{"version", options_.version},
                    {"compiler", Compiler()},
                    {"cuda", options_.cuda ? "yes" : "no"}});
    if (options_.service) WriteService(options_.service(), &writer);
    const prometheus::Collectable* parts[] = {&cache_, &registry_, &gpus_, &allocator_, &process_};
    for (const prometheus::Collectable* part : parts) {
      for (prometheus::MetricFamily& family : part->Collect()) families.push_back(std::move(family));
    }
    return families;
  }

 private:
  const MetricsOptions options_;
  prometheus::Registry registry_;
  RequestMetrics requests_;
  const std::vector<prometheus::Histogram*> works_;
  const CacheCollector cache_;
  const GpuCollector gpus_;
  const AllocatorCollector allocator_;
  const ProcessCollector process_;
};

}  // namespace

struct Metrics::Impl {
  explicit Impl(MetricsOptions options) : everything(std::move(options)) {}
  Everything everything;
  std::unique_ptr<Endpoint> endpoint;
};

Metrics::Metrics(MetricsOptions options) {
  KVTIDE_CHECK(options.stats, "metrics need the cache's statistics");
  impl_ = std::make_unique<Impl>(std::move(options));
}

Metrics::~Metrics() { Stop(); }

void Metrics::RecordCall(const CallSample& call) { impl_->everything.requests().Record(call); }

void Metrics::RecordLookup(std::string_view tenant, std::string_view unit, std::string_view tier,
                           uint64_t count) {
  impl_->everything.requests().RecordLookup(tenant, unit, tier, count);
}

void Metrics::RecordWork(size_t work, absl::Duration time) { impl_->everything.RecordWork(work, time); }

absl::StatusOr<std::string> Metrics::Start(const std::string& address) {
  KVTIDE_CHECK(impl_->endpoint == nullptr, "metrics were started already");
  KVTIDE_ASSIGN_OR_RETURN(EndpointAddress bound, ParseEndpointAddress(address));
  KVTIDE_ASSIGN_OR_RETURN(impl_->endpoint, Endpoint::Start(bound, [this] { return Text(); }));
  bound.port = impl_->endpoint->port();
  return bound.Text();
}

void Metrics::Stop() { impl_->endpoint.reset(); }

std::string Metrics::Text() const { return Serialize(impl_->everything.Collect()); }

}  // namespace kvtide::metrics
