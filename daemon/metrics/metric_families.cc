#include "daemon/metrics/metric_families.h"

#include "kernels/base/check.h"

namespace kvtide::metrics {

FamilyList& FamilyList::Gauge(const std::string& name, const std::string& help) {
  families_.push_back({name, help, prometheus::MetricType::Gauge, {}});
  return *this;
}

FamilyList& FamilyList::Counter(const std::string& name, const std::string& help) {
  families_.push_back({name, help, prometheus::MetricType::Counter, {}});
  return *this;
}

FamilyList& FamilyList::Value(double value, const Labels& labels) {
  KVTIDE_CHECK(!families_.empty());
  prometheus::MetricFamily& family = families_.back();
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
