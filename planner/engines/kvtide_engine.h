// Cache bytes of kvtided: whole blocks of BlockLayout, an exact window in f16 at either end of every
// sequence, the block that is being filled, blocks of a shared prefix once. The same code sizes the daemon's
// pools.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/format/block_layout.h"
#include "planner/engines/kv_sizer.h"

namespace kvtide::planner {

// Most scratch memory of one attention call on a GPU: CudaBackendOptions::scratch_bytes (a test compares
// them).
constexpr int64_t kKvtideScratchBytes = int64_t{256} << 20;
// Most memory of a GPU that plans of attention keep: CacheOptions::max_plan_bytes (a test compares them).
constexpr int64_t kKvtidePlanBytes = int64_t{64} << 20;

absl::StatusOr<std::unique_ptr<KvSizer>> MakeKvtideSizer(const EngineOptions& options,
                                                         const std::vector<LayerGroup>& groups,
                                                         const TypePair& pair);
// Those with calibrated K types only where the options have a profile with transforms.
std::vector<TypePair> KvtidePairs(const EngineOptions& options);

// The pool of one layer group: how many blocks of which layout a load needs.
struct PoolNeed {
  GroupShape shape;
  int window = 0;
  int64_t exact_blocks = 0;
  int64_t coded_blocks = 0;
  int64_t exact_block_bytes = 0;
  int64_t coded_block_bytes = 0;
  int64_t Bytes() const { return exact_blocks * exact_block_bytes + coded_blocks * coded_block_bytes; }
};
absl::StatusOr<std::vector<PoolNeed>> KvtidePools(const EngineOptions& options,
                                                  const std::vector<LayerGroup>& groups, const TypePair& pair,
                                                  const KvLoad& load);

}  // namespace kvtide::planner
