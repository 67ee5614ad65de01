// Whether an engine can attend over a pair at a head dim, and how: a question apart from size. A smaller
// cache can need more memory (a f16 copy as scratch) or run on the CPU when its kernel is missing.
#pragma once

#include <string>
#include <vector>

#include "planner/engines/engine.h"
#include "planner/model/geometry.h"
#include "planner/type_pair.h"

namespace kvtide::planner {

enum class SupportLevel {
  kNative,       // the kernel reads the types as they are stored
  kDequantise,   // every step first writes an f16 copy of the cache of one layer
  kCpuFallback,  // no kernel on the GPU; attention runs on the CPU
  kRefused,      // the engine does not start
};

const char* SupportLevelName(SupportLevel level);

struct Support {
  SupportLevel level = SupportLevel::kNative;
  std::string build;   // the tree that was judged
  std::string reason;  // empty for kNative

  // A fork of llama.cpp that somebody has to build first.
  bool NeedsFork() const { return build == "turboquant" || build == "pairquant" || build == "planarquant"; }
};

// The matrix: one engine and build, one pair and head dims.
Support FindSupport(const EngineOptions& options, const TypePair& pair, int head_dim_k, int head_dim_v);

// The worst over the layers of a model.
Support FindSupport(const EngineOptions& options, const TypePair& pair,
                    const std::vector<LayerGroup>& groups);

}  // namespace kvtide::planner
