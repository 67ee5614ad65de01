// Cache bytes of vLLM's block pool: pages unified over kinds of layers, groups of equal numbers of layers,
// blocks per request rounded up per group. MLA latents are not divided by tensor parallelism.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/engines/kv_sizer.h"

namespace kvtide::planner {

absl::StatusOr<std::unique_ptr<KvSizer>> MakeVllmSizer(const EngineOptions& options,
                                                       const std::vector<LayerGroup>& groups,
                                                       const TypePair& pair);
std::vector<TypePair> VllmPairs();

// The value of --kv-cache-dtype for a pair; empty when vLLM has none.
std::string VllmCacheDtype(const TypePair& pair);

// Arithmetic of the unified pool, for tests and for `--explain`.
struct VllmPool {
  int64_t page_bytes = 0;    // one layer, one block
  int64_t group_layers = 0;  // layers per group
  int64_t BlockBytes() const { return Product(page_bytes, group_layers); }
};
absl::StatusOr<VllmPool> MakeVllmPool(const EngineOptions& options, const std::vector<LayerGroup>& groups,
                                      const TypePair& pair);

// Blocks of one request of `context` tokens.
absl::StatusOr<int64_t> VllmBlocksPerRequest(const EngineOptions& options,
                                             const std::vector<LayerGroup>& groups, const TypePair& pair,
                                             int64_t context);

}  // namespace kvtide::planner
