#include "tests/daemon/cache/dense_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/format/page_order.h"
#include "tests/daemon/cache/dense_loops.h"

namespace kvtide::testing {

AttentionResult AttendDense(const DenseAttention& attention, std::span<const float* const> k,
                            std::span<const float* const> v, int64_t tokens, const float* q, int64_t queries,
                            int64_t first_position) {
  const auto heads = static_cast<size_t>(attention.heads), kv_heads = static_cast<size_t>(attention.kv_heads),
             dim_k = static_cast<size_t>(attention.dim_k), dim_v = static_cast<size_t>(attention.dim_v);
  constexpr double kNothing = std::numeric_limits<double>::lowest();
  AttentionResult result;
  result.out.resize(static_cast<size_t>(queries) * heads * dim_v);
  result.lse.resize(static_cast<size_t>(queries) * heads, -std::numeric_limits<float>::infinity());
  const auto begin_of = [&](int64_t position) {
    return attention.window > 0 ? std::max<int64_t>(0, position - attention.window + 1) : 0;
  };
  const auto end_of = [&](int64_t position) {
    return attention.causal ? std::min(tokens, position + 1) : tokens;
  };
  // What a query sees does not end before what the one ahead of it sees does.
  struct Row {
    size_t query, head;
    int64_t begin, end;
  };
  std::vector<Row> rows;
  std::vector<double> scaled(kTileRows * dim_k), out(kTileRows * dim_v), weights;
  std::vector<const float*> head_k(k.size()), head_v(v.size());
  for (size_t kv = 0; kv < kv_heads; kv++) {
    rows.clear();
    for (size_t i = 0; i < static_cast<size_t>(queries); i++)
      for (size_t h = kv * (heads / kv_heads); h < (kv + 1) * (heads / kv_heads); h++) {
        const int64_t position = first_position + static_cast<int64_t>(i);
        const int64_t begin = begin_of(position), end = end_of(position);
        if (begin < end) {
          rows.push_back({i, h, begin, end});
        } else if (attention.sinks != nullptr) {
          result.lse[i * heads + h] = attention.sinks[h];
        }
      }
    for (size_t b = 0; b < k.size(); b++) head_k[b] = k[b] != nullptr ? k[b] + kv * dim_k : nullptr;
    for (size_t b = 0; b < v.size(); b++) head_v[b] = v[b] != nullptr ? v[b] + kv * dim_v : nullptr;
    for (size_t first = 0; first < rows.size(); first += kTileRows) {
      const size_t last = std::min(rows.size(), first + kTileRows);
      int64_t begin = rows[first].begin, end = rows[first].end;
      for (size_t r = first; r < last; r++) {
        begin = std::min(begin, rows[r].begin);
        end = std::max(end, rows[r].end);
      }
      DenseTile tile;
      tile.q = scaled.data();
      tile.k = head_k.data();
      tile.v = head_v.data();
      tile.block_tokens = kBlockTokens;
      tile.k_stride = kv_heads * dim_k;
      tile.v_stride = kv_heads * dim_v;
      tile.dim_k = dim_k;
      tile.dim_v = dim_v;
      tile.first = static_cast<size_t>(begin);
      tile.tokens = static_cast<size_t>(end - begin);
      tile.softcap = attention.softcap;
      tile.out = out.data();
      weights.resize(kTileRows * tile.tokens);
      tile.weights = weights.data();
      for (size_t r = 0; r < kTileRows; r++) {  // the last row again where there are fewer
        const Row& row = rows[std::min(first + r, last - 1)];
        tile.begin[r] = static_cast<size_t>(row.begin - begin);
        tile.end[r] = static_cast<size_t>(row.end - begin);
        tile.least[r] =
            attention.sinks != nullptr ? static_cast<double>(attention.sinks[row.head]) : kNothing;
        const float* const from = q + (row.query * heads + row.head) * dim_k;
        for (size_t d = 0; d < dim_k; d++)
          scaled[r * dim_k + d] = static_cast<double>(from[d]) * attention.scale;
      }
      RunDenseTile(tile);
      for (size_t r = first; r < last; r++) {
        const size_t at = rows[r].query * heads + rows[r].head;
        double sum = tile.sum[r - first];
        const double largest = tile.largest[r - first];
        if (attention.sinks != nullptr)
          sum += std::exp(static_cast<double>(attention.sinks[rows[r].head]) - largest);
        for (size_t d = 0; d < dim_v; d++)
          result.out[at * dim_v + d] = static_cast<float>(out[(r - first) * dim_v + d] / sum);
        result.lse[at] = static_cast<float>(largest + std::log(sum));
      }
    }
  }
  return result;
}

}  // namespace kvtide::testing
