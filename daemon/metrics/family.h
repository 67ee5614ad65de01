// Builds metric families for collectors: gauges and counters whose value is read at scrape time.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "prometheus/metric_family.h"

namespace kvtide::metrics {

using Labels = std::vector<std::pair<std::string, std::string>>;

// Appends families to a vector: Gauge or Counter begins one, Sample adds to the last one.
class FamilyWriter {
 public:
  explicit FamilyWriter(std::vector<prometheus::MetricFamily>* families) : families_(families) {}

  FamilyWriter& Gauge(const char* name, const char* help) {
    return Begin(name, help, prometheus::MetricType::Gauge);
  }
  // `name` ends in _total.
  FamilyWriter& Counter(const char* name, const char* help) {
    return Begin(name, help, prometheus::MetricType::Counter);
  }
  // `counts` are those of the buckets that end at `bounds`, and of a last one beyond them; `sum` of all
  // values.
  FamilyWriter& Histogram(const char* name, const char* help, std::span<const double> bounds,
                          std::span<const uint64_t> counts, double sum);
  // Its samples are Buckets.
  FamilyWriter& Histogram(const char* name, const char* help) {
    return Begin(name, help, prometheus::MetricType::Histogram);
  }
  // How many took at most each bound, not counted for those before, and last those beyond; their sum.
  FamilyWriter& Buckets(std::span<const double> bounds, std::span<const uint64_t> counts, double sum,
                        const Labels& labels = {});
  FamilyWriter& Sample(double value, const Labels& labels = {});

 private:
  FamilyWriter& Begin(const char* name, const char* help, prometheus::MetricType type);

  std::vector<prometheus::MetricFamily>* const families_;
};

}  // namespace kvtide::metrics
