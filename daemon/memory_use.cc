#include "daemon/memory_use.h"

#include <unistd.h>

#include <fstream>

#include "planner/engines/kvtide_engine.h"
#include "planner/plan/overheads.h"

namespace kvtide {

int64_t ResidentBytes() {
  int64_t all = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> all >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

std::vector<service::MemoryUse> MeasureMemory(const KvCache& cache, int64_t overhead_limit,
                                              std::optional<int64_t> gpu_bytes) {
  const SequenceMemory sequences = cache.MemoryOfSequences();
  int64_t host = overhead_limit, gpus = 0;
  for (const TierOptions& tier : cache.options().tiers) {
    if (!tier.attends()) continue;
    const auto capacity = static_cast<int64_t>(tier.capacity_bytes);
    if (tier.Medium().rfind("cuda", 0) != 0) {
      host += capacity;
    } else {
      gpus += capacity + planner::kCudaContextBytes + planner::kKvtideScratchBytes;
    }
  }
  std::vector<service::MemoryUse> memory = {{"sequences", static_cast<int64_t>(sequences.predicted_bytes),
                                             static_cast<int64_t>(sequences.held_bytes)},
                                            {"host", host, ResidentBytes()}};
  // Plans of attention have one limit for all devices.
  if (gpus > 0 && gpu_bytes) memory.push_back({"gpus", gpus + planner::kKvtidePlanBytes, *gpu_bytes});
  return memory;
}

}  // namespace kvtide
