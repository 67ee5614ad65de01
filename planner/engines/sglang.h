// Cache bytes of SGLang's token pool (0.5.23): slots of single tokens, a second pool for sliding layers that
// is a fixed share of the first, slots for recurrent states, keys of sparse-attention indexers. Latents and
// indexer keys are not divided by tensor parallelism.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/engines/kv_sizer.h"

namespace kvtide::planner {

absl::StatusOr<std::unique_ptr<KvSizer>> MakeSglangSizer(const EngineOptions& options,
                                                         const std::vector<LayerGroup>& groups,
                                                         const TypePair& pair);
std::vector<TypePair> SglangPairs();

// The value of --kv-cache-dtype for a pair; empty when SGLang has none.
std::string SglangCacheDtype(const TypePair& pair);

// What SGLang decides at its start when nobody tells it, from the memory that the driver reports.
struct SglangDefaults {
  int chunked_prefill = 0;  // --chunked-prefill-size
  int graph_batch = 0;      // --cuda-graph-max-bs
  double mem_fraction_static =
      0;  // weights and pools as a share of the memory; the rest serves activations and graphs
};
SglangDefaults DefaultsOfSglang(const EngineOptions& options, int64_t device_bytes, int devices, bool latent);

// Bytes that a token takes in every pool that keeps all tokens, summed over layers ("cell size").
absl::StatusOr<int64_t> SglangCellBytes(const EngineOptions& options, const std::vector<LayerGroup>& groups,
                                        const TypePair& pair);

}  // namespace kvtide::planner
