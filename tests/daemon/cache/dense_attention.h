// Attention by its definition, in float64: every query with every key that it sees, nothing approximated and
// nothing left out. It is what the cache's answers are compared with, so it has to be right before it is
// fast; but a simulation that compares every answer spends most of its time here, so the loops are ones that
// a compiler makes vectors of.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvtide::testing {

struct AttentionResult {
  std::vector<float> out;  // [queries][heads][dim_v]
  std::vector<float> lse;  // [queries][heads]
};

struct DenseAttention {
  int heads = 1, kv_heads = 1;
  int dim_k = 0, dim_v = 0;
  double scale = 1;
  double softcap = 0;  // 0: none
  int64_t window = 0;  // tokens that a query sees, itself included; 0: all
  bool causal = true;
  const float* sinks = nullptr;  // a logit without a value, by head; null: none
};

// Queries q [queries][heads][dim_k], the first one at position `first_position`, over `tokens` rows. k and v
// are those rows in blocks of kBlockTokens tokens, each [token][kv_heads][dim]; blocks before the window of
// the first query are not read.
AttentionResult AttendDense(const DenseAttention& attention, std::span<const float* const> k,
                            std::span<const float* const> v, int64_t tokens, const float* q, int64_t queries,
                            int64_t first_position);

}  // namespace kvtide::testing
