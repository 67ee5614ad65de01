#include "daemon/metrics/metrics.h"

#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/metrics/allocator_collector.h"
#include "daemon/metrics/cache_collector.h"
#include "daemon/metrics/endpoint_address.h"
#include "daemon/metrics/family.h"
#include "daemon/metrics/process_collector.h"
#include "daemon/metrics/request_metrics.h"
#include "kernels/base/check.h"
#include "prometheus/exposer.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"

namespace kvtide::metrics {
namespace {

constexpr size_t kEndpointThreads = 2;

std::string Compiler() {
#if defined(__clang__)
  return absl::StrCat("clang ", __clang_major__, ".", __clang_minor__);
#else
  return absl::StrCat("gcc ", __GNUC__, ".", __GNUC_MINOR__);
#endif
}

// All of a scrape, in one order: build, cache, calls, allocator, process.
class Everything final : public prometheus::Collectable {
 public:
  explicit Everything(MetricsOptions options)
      : options_(std::move(options)),
        requests_(&registry_),
        cache_(options_.stats),
        allocator_(ProcessMallctl()) {}

  RequestMetrics& requests() { return requests_; }

  std::vector<prometheus::MetricFamily> Collect() const override {
    std::vector<prometheus::MetricFamily> families;
    FamilyWriter writer(&families);
    writer.Gauge("kvtide_build_info", "Version and build of the daemon.")
        .Sample(1, {{"version", options_.version},
                    {"compiler", Compiler()},
                    {"cuda", options_.cuda ? "yes" : "no"}});
    if (options_.calls_under_way) {
      writer.Gauge("kvtide_calls_under_way", "Calls that have arrived and are not answered yet.")
          .Sample(static_cast<double>(options_.calls_under_way()));
    }
    const prometheus::Collectable* parts[] = {&cache_, &registry_, &allocator_, &process_};
    for (const prometheus::Collectable* part : parts) {
      for (prometheus::MetricFamily& family : part->Collect()) families.push_back(std::move(family));
    }
    return families;
  }

 private:
  const MetricsOptions options_;
  prometheus::Registry registry_;
  RequestMetrics requests_;
  const CacheCollector cache_;
  const AllocatorCollector allocator_;
  const ProcessCollector process_;
};

}  // namespace

struct Metrics::Impl {
  explicit Impl(MetricsOptions options) : everything(std::make_shared<Everything>(std::move(options))) {}
  std::shared_ptr<Everything> everything;
  std::unique_ptr<prometheus::Exposer> exposer;
};

Metrics::Metrics(MetricsOptions options) {
  KVTIDE_CHECK(options.stats, "metrics need the cache's statistics");
  impl_ = std::make_unique<Impl>(std::move(options));
}

Metrics::~Metrics() { Stop(); }

void Metrics::RecordCall(const char* method, int code, absl::Duration duration, int64_t request_bytes,
                         int64_t response_bytes) {
  impl_->everything->requests().Record(method, code, duration, request_bytes, response_bytes);
}

absl::StatusOr<std::string> Metrics::Start(const std::string& address) {
  KVTIDE_CHECK(impl_->exposer == nullptr, "metrics were started already");
  absl::StatusOr<EndpointAddress> endpoint = ParseEndpointAddress(address);
  if (!endpoint.ok()) return endpoint.status();
  try {
    impl_->exposer = std::make_unique<prometheus::Exposer>(endpoint->Text(), kEndpointThreads);
  } catch (const std::exception& error) {
    // The library does not say why; the address does.
    const absl::Status reason = CheckBindable(*endpoint);
    if (!reason.ok()) return reason;
    return absl::UnavailableError(absl::StrCat("metrics address ", endpoint->Text(), ": ", error.what()));
  }
  impl_->exposer->RegisterCollectable(impl_->everything);
  endpoint->port = impl_->exposer->GetListeningPorts().front();
  return endpoint->Text();
}

void Metrics::Stop() { impl_->exposer.reset(); }

std::string Metrics::Text() const {
  return prometheus::TextSerializer().Serialize(impl_->everything->Collect());
}

}  // namespace kvtide::metrics
