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

// nullptr for an unknown name.
const GgmlType* FindGgmlType(const std::string& name);
const std::vector<GgmlType>& GgmlTypes();

// The tree that a pair needs: "upstream", "turboquant", "pairquant", "planarquant"; an asked tree is kept if
// it has both types. Empty when no tree has both.
std::string ResolveTree(const std::string& build, const TypePair& pair);

absl::StatusOr<std::unique_ptr<KvSizer>> MakeLlamaCppSizer(const EngineOptions& options,
                                                           const ModelGeometry& model,
                                                           const std::vector<LayerGroup>& groups,
                                                           const TypePair& pair);
std::vector<TypePair> LlamaCppPairs();

}  // namespace kvtide::planner
