#include "daemon/metrics/family.h"

#include <limits>
#include <utility>

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
  return Histogram(name, help).Buckets(bounds, counts, sum);
}

FamilyWriter& FamilyWriter::Buckets(std::span<const double> bounds, std::span<const uint64_t> counts,
                                    double sum, const Labels& labels) {
  prometheus::ClientMetric metric;
  for (const auto& [name, text] : labels) metric.label.push_back({name, text});
  uint64_t count = 0;
  for (size_t i = 0; i < counts.size(); i++) {
    count += counts[i];
    const double bound = i < bounds.size() ? bounds[i] : std::numeric_limits<double>::infinity();
    metric.histogram.bucket.push_back({count, bound});
  }
  metric.histogram.sample_count = count;
  metric.histogram.sample_sum = sum;
  families_->back().metric.push_back(std::move(metric));
  return *this;
}

}  // namespace kvtide::metrics
