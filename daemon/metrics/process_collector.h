// The usual process_* families from /proc/self. What cannot be read is left out.
#pragma once

#include <string>
#include <vector>

#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"

namespace kvtide::metrics {

class ProcessCollector final : public prometheus::Collectable {
 public:
  // `proc`: where proc is mounted.
  explicit ProcessCollector(std::string proc = "/proc") : proc_(std::move(proc)) {}
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::string proc_;
};

}  // namespace kvtide::metrics
