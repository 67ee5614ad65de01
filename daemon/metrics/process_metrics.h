// The process itself: memory, processor time, files and threads from /proc/self under the names that all
// Prometheus clients use, and the allocator's statistics when jemalloc is linked. Thread-safe.
#pragma once

#include <vector>

#include "prometheus/collectable.h"

namespace kvtide::metrics {

class ProcessMetrics : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override;
};

}  // namespace kvtide::metrics
