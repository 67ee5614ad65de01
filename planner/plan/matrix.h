// The support matrix as text: for every pair of an engine and every head dim, what the attention kernel does
// and how much scratch it needs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "planner/engines/support.h"

namespace kvtide::planner {

struct MatrixRow {
  TypePair pair;
  int head_dim = 0;
  Support support;
  int64_t scratch_bytes_per_token = 0;  // f16 copy of one layer, per KV head
};

std::vector<MatrixRow> SupportMatrix(const EngineOptions& options, const std::vector<TypePair>& pairs,
                                     const std::vector<int>& head_dims);

std::string RenderMatrix(const std::vector<MatrixRow>& rows);

}  // namespace kvtide::planner
