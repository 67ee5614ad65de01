#include "daemon/metrics/family.h"

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

}  // namespace kvtide::metrics
