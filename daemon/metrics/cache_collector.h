// The cache's books at scrape time. All families of one scrape come from one snapshot, so their sums agree.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "daemon/cache/call/cache_stats.h"
#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"

namespace kvtide::metrics {

class CacheCollector final : public prometheus::Collectable {
 public:
  explicit CacheCollector(std::function<CacheStats()> stats) : stats_(std::move(stats)) {}
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::function<CacheStats()> stats_;
};

}  // namespace kvtide::metrics
