// jemalloc's books: what the daemon allocated, and what that costs in pages. Without jemalloc in the process
// (sanitizers) the families are left out.
#pragma once

#include <cstddef>
#include <vector>

#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"

namespace kvtide::metrics {

// jemalloc's mallctl: reads `*old_length` bytes of the value `name` into `old_value`, writes `new_value`; 0 =
// done.
using Mallctl = int (*)(const char* name, void* old_value, size_t* old_length, void* new_value,
                        size_t new_length);

// That of the process; null when jemalloc is not linked.
Mallctl ProcessMallctl();

class AllocatorCollector final : public prometheus::Collectable {
 public:
  explicit AllocatorCollector(Mallctl mallctl) : mallctl_(mallctl) {}
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const Mallctl mallctl_;
};

}  // namespace kvtide::metrics
