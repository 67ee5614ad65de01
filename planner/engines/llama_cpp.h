// Cache bytes of llama.cpp and of trees derived from it: cells padded to 256, windowed sliding layers, K-only
// MLA, the types that each tree adds, and the turboquant tree's silent rewrites (docs: planner/README.md).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/engines/kv_sizer.h"

namespace kvtide::planner {

// A storage format as llama.cpp counts it: `bytes` for `group` values of a row.
struct GgmlType {
  const char* name;
  int group;
  int bytes;
  const char* tree;  // the first tree that has it
  bool half() const { return group == 1; }
};

constexpr int kLlamaCppMaxSlots = 256;  // LLAMA_MAX_SEQ

// nullptr for an unknown name.
const GgmlType* FindGgmlType(const std::string& name);
const std::vector<GgmlType>& GgmlTypes();

// InvalidArgument lists what is known.
absl::Status CheckLlamaBuild(const std::string& build);

// The tree that a pair needs: "upstream", "turboquant", "pairquant", "planarquant"; an asked tree is kept if
// it has both types. Empty when no tree has both.
std::string ResolveTree(const std::string& build, const TypePair& pair);

// Whether a build runs pairs without a kernel of their own on the CPU. Upstream builds up to b10819 at least
// do, and so do the forks, which are older; newer ones expand such a pair to f16 on the GPU
// (ggml-org/llama.cpp #28079).
bool FallsBackToCpu(const std::string& build, const std::string& tree);

// Cells of one stream of the cache for layers with this window (0 = full attention) and so many tokens per
// cell.
int64_t LlamaCppCells(const EngineOptions& options, int window, int compress, const KvLoad& load);

// The compute buffer that llama.cpp reserves on one of `devices` GPUs: the activations of one ubatch, the
// logits of at most one output per slot, scores without flash attention, and the masks (README.md has the
// formula; tests hold it against start-up logs).
int64_t LlamaCppComputeBytes(const ModelGeometry& model, const EngineOptions& options, int devices,
                             const KvLoad& load);

// The width between the halves of a feed-forward layer: the model's, or an estimate from its size.
int64_t FeedForwardWidth(const ModelGeometry& model);

absl::StatusOr<std::unique_ptr<KvSizer>> MakeLlamaCppSizer(const EngineOptions& options,
                                                           const ModelGeometry& model,
                                                           const std::vector<LayerGroup>& groups,
                                                           const TypePair& pair);
// Worth listing: pairs of upstream types, with `forks` also those of the forks.
std::vector<TypePair> LlamaCppPairs(bool forks);

}  // namespace kvtide::planner
