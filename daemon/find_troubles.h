// Looks at the cache for what is wrong and stays so: tiers that take no blocks, a remote tier that is away,
// sequences that do not become durable, GPUs that are lost. Not thread-safe.
#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "daemon/cache/call/cache_stats.h"
#include "daemon/lost_devices.h"
#include "daemon/service/troubles.h"

namespace kvtide {

class TroubleFinder {
 public:
  // To be called every few seconds.
  void Look(const CacheStats& stats, const LostDevices& lost, absl::Time now, service::Troubles* troubles);

 private:
  uint64_t failed_persists_ = 0;  // as of the last look
  absl::Time failed_at_ = absl::InfinitePast();
};

}  // namespace kvtide
