// The cache's statistics as Prometheus families, taken at scrape time from one snapshot: the cache itself
// counts nothing for Prometheus. Thread-safe.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "daemon/cache/cache_stats.h"
#include "prometheus/collectable.h"

namespace kvtide::metrics {

class CacheMetrics : public prometheus::Collectable {
 public:
  // `stats` is called at every scrape, by the scraping thread.
  CacheMetrics(std::function<CacheStats()> stats, std::string version)
      : stats_(std::move(stats)), version_(std::move(version)) {}
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::function<CacheStats()> stats_;
  const std::string version_;
};

}  // namespace kvtide::metrics
