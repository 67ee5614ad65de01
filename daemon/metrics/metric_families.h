// Builds the metric families of one scrape from plain numbers. Not thread-safe; made and consumed inside a
// Collect call.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "prometheus/metric_family.h"

namespace kvtide::metrics {

class FamilyList {
 public:
  using Labels = std::vector<std::pair<std::string, std::string>>;

  // Begins a family; values that follow belong to it.
  FamilyList& Gauge(const std::string& name, const std::string& help);
  FamilyList& Counter(const std::string& name, const std::string& help);
  FamilyList& Value(double value, const Labels& labels = {});
  FamilyList& Value(uint64_t value, const Labels& labels = {}) {
    return Value(static_cast<double>(value), labels);
  }

  std::vector<prometheus::MetricFamily> Take() { return std::move(families_); }

 private:
  std::vector<prometheus::MetricFamily> families_;
};

}  // namespace kvtide::metrics
