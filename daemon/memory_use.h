// What the memory of the daemon should be, by the planner's arithmetic and the daemon's limits, and what it
// is: the pair that tells whether a plan can be trusted.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "daemon/service/service_options.h"

namespace kvtide {

// `overhead_limit`: the most that the daemon takes beside its tiers in host memory. `gpu_bytes`: what it
// holds of all GPUs; nullopt = the driver does not tell, and "gpus" is left out.
std::vector<service::MemoryUse> MeasureMemory(const KvCache& cache, int64_t overhead_limit,
                                              std::optional<int64_t> gpu_bytes);

// Resident bytes of this process; 0 where the kernel does not tell.
int64_t ResidentBytes();

}  // namespace kvtide
