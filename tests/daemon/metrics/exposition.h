// A daemon that has been busy: statistics in which no number occurs twice, and the metrics over them.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "daemon/cache/call/cache_stats.h"
#include "daemon/metrics/metrics.h"

namespace kvtide::metrics {

// Two tiers, three pairs. Sums agree: a tier's pairs add up to its blocks and used bytes, tiers to the stored
// bytes.
CacheStats BusyStats();

// Over BusyStats, with some calls recorded.
std::unique_ptr<Metrics> BusyMetrics();

// The samples of an exposition, by `name{labels}` as printed; and the families' types by name.
struct Exposition {
  std::map<std::string, double> samples;
  std::map<std::string, std::string> types;
};
Exposition ParseExposition(const std::string& text);

}  // namespace kvtide::metrics
