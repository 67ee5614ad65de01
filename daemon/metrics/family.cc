#include "daemon/metrics/family.h"

#include <limits>

namespace kvtide::metrics {

FamilyWriter& FamilyWriter::Begin(const char* name, const char* help, prometheus::MetricType type) {
  prometheus::MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  families_->push_back(std::move(family));
  return *this;
}

FamilyWriter& FamilyWriter::Sample(double value, const Labels& labels) {
  prometheus::MetricFamily& family = families_->back();
  prometheus::ClientMetric metric;
  for (const auto& [name, text] : labels) metric.label.push_back({name, text});
  if (family.type == prometheus::MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  family.metric.push_back(std::move(metric));
  return *this;
}

FamilyWriter& FamilyWriter::Histogram(const char* name, const char* help, std::span<const double> bounds,
                                      std::span<const uint64_t> counts, double sum) {
  Begin(name, help, prometheus::MetricType::Histogram);
  prometheus::ClientMetric& metric = families_->back().metric.emplace_back();
  uint64_t all = 0;
  for (size_t i = 0; i < counts.size(); i++) {
    all += counts[i];
    const double bound = i < bounds.size() ? bounds[i] : std::numeric_limits<double>::infinity();
    metric.histogram.bucket.push_back({all, bound});
  }
  metric.histogram.sample_count = all;
  metric.histogram.sample_sum = sum;
  return *this;
}

}  // namespace kvtide::metrics
