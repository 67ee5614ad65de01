// Metric families as the text that Prometheus reads, exposition format 0.0.4: what prometheus::TextSerializer
// writes, without its streams, which took most of a scrape's time. Numbers are the shortest that read back as
// the same.
#pragma once

#include <string>
#include <vector>

#include "prometheus/metric_family.h"

namespace kvtide::metrics {

// Gauges, counters and histograms; there are no others here.
std::string Serialize(const std::vector<prometheus::MetricFamily>& families);

}  // namespace kvtide::metrics
