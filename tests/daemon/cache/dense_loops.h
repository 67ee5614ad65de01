// The loops of dense_attention.h, for the widest vectors that the processor has. Compiled with -ffast-math:
// sums may be taken in any order and exp may be that of a vector library (4 units of the last place of a
// double), so what comes in has to be finite.
#pragma once

#include <cstddef>

namespace kvtide::testing {

constexpr size_t kTileRows = 4;

// Rows of queries that look at the same rows of keys and values, which lie in one block after another.
struct DenseTile {
  const double* q = nullptr;  // [kTileRows][dim_k], scaled
  const float* const* k = nullptr;
  const float* const* v = nullptr;    // blocks; the first token is token 0 of the first one
  size_t block_tokens = 0;            // of each
  size_t k_stride = 0, v_stride = 0;  // values from one token to the next
  size_t dim_k = 0, dim_v = 0;
  size_t first = 0, tokens = 0;                       // of all: [first, first + tokens)
  size_t begin[kTileRows] = {}, end[kTileRows] = {};  // of each, in [0, tokens), not empty
  double softcap = 0;                                 // 0: none
  double least[kTileRows] = {};                       // what the largest logit is taken for at least
  double* weights = nullptr;                          // scratch, [kTileRows][tokens]
  // Results: the largest logit or `least`, the sum of exp(logit - largest), the sum of values by these.
  double largest[kTileRows] = {}, sum[kTileRows] = {};
  double* out = nullptr;  // [kTileRows][dim_v]
};

void RunDenseTile(DenseTile& tile);

}  // namespace kvtide::testing
