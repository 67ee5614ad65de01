#include "tests/daemon/cache/dense_loops.h"

#include <algorithm>
#include <cmath>

namespace kvtide::testing {
namespace {

// Part of a function for each kind of processor: they differ in what the compiler may use.
#define KVTIDE_LOOP [[gnu::always_inline]] inline

KVTIDE_LOOP void Products(const DenseTile& tile, const float* keys, size_t count, double* logits) {
  const double *const q0 = tile.q, *const q1 = q0 + tile.dim_k, *const q2 = q1 + tile.dim_k,
                      *const q3 = q2 + tile.dim_k;
  for (size_t t = 0; t < count; t++) {
    const float* const key = keys + t * tile.k_stride;
    double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (size_t d = 0; d < tile.dim_k; d++) {
      const auto x = static_cast<double>(key[d]);
      s0 += q0[d] * x;
      s1 += q1[d] * x;
      s2 += q2[d] * x;
      s3 += q3[d] * x;
    }
    logits[t] = s0;
    logits[tile.tokens + t] = s1;
    logits[2 * tile.tokens + t] = s2;
    logits[3 * tile.tokens + t] = s3;
  }
}

// The weighted values of two tokens, to all rows.
KVTIDE_LOOP void AddTwo(const float* __restrict a, const float* __restrict b, const double* weights_a,
                        const double* weights_b, size_t stride, size_t dim, double* __restrict out) {
  const double a0 = weights_a[0], a1 = weights_a[stride], a2 = weights_a[2 * stride],
               a3 = weights_a[3 * stride];
  const double b0 = weights_b[0], b1 = weights_b[stride], b2 = weights_b[2 * stride],
               b3 = weights_b[3 * stride];
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (size_t d = 0; d < dim; d++) {
    const auto x = static_cast<double>(a[d]), y = static_cast<double>(b[d]);
    out[d] += a0 * x + b0 * y;
    out[dim + d] += a1 * x + b1 * y;
    out[2 * dim + d] += a2 * x + b2 * y;
    out[3 * dim + d] += a3 * x + b3 * y;
  }
}

KVTIDE_LOOP void AddValues(const DenseTile& tile, const float* values, size_t count, const double* weights) {
  for (size_t t = 0; t + 1 < count; t += 2)
    AddTwo(values + t * tile.v_stride, values + (t + 1) * tile.v_stride, weights + t, weights + t + 1,
           tile.tokens, tile.dim_v, tile.out);
  if (count % 2 == 0) return;
  const float* const last = values + (count - 1) * tile.v_stride;
  for (size_t r = 0; r < kTileRows; r++) {
    const double weight = weights[r * tile.tokens + count - 1];
    double* const out = tile.out + r * tile.dim_v;
    for (size_t d = 0; d < tile.dim_v; d++) out[d] += weight * static_cast<double>(last[d]);
  }
}

KVTIDE_LOOP void Run(DenseTile& tile) {
  const auto for_blocks = [&](auto body) {
    for (size_t at = 0; at < tile.tokens;) {
      const size_t block = (tile.first + at) / tile.block_tokens,
                   offset = (tile.first + at) % tile.block_tokens;
      const size_t count = std::min(tile.tokens - at, tile.block_tokens - offset);
      body(block, offset, at, count);
      at += count;
    }
  };
  for_blocks([&](size_t block, size_t offset, size_t at, size_t count) {
    Products(tile, tile.k[block] + offset * tile.k_stride, count, tile.weights + at);
  });
  for (size_t r = 0; r < kTileRows; r++) {
    double* const row = tile.weights + r * tile.tokens;
    const size_t begin = tile.begin[r], end = tile.end[r];
    if (tile.softcap > 0)  // tanh x = 1 - 2 / (exp 2x + 1): vector libraries have exp
      for (size_t t = begin; t < end; t++)
        row[t] = tile.softcap * (1 - 2 / (std::exp(2 * row[t] / tile.softcap) + 1));
    double largest = tile.least[r];
    for (size_t t = begin; t < end; t++) largest = row[t] > largest ? row[t] : largest;
    double sum = 0;
    for (size_t t = begin; t < end; t++) {
      row[t] = std::exp(row[t] - largest);
      sum += row[t];
    }
    std::fill(row, row + begin, 0.0);
    std::fill(row + end, row + tile.tokens, 0.0);
    tile.largest[r] = largest;
    tile.sum[r] = sum;
  }
  std::fill(tile.out, tile.out + kTileRows * tile.dim_v, 0.0);
  for_blocks([&](size_t block, size_t offset, size_t at, size_t count) {
    AddValues(tile, tile.v[block] + offset * tile.v_stride, count, tile.weights + at);
  });
}

#if defined(__x86_64__)
[[gnu::target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")]] void RunAvx512(DenseTile& tile) { Run(tile); }
[[gnu::target("avx2,fma")]] void RunAvx2(DenseTile& tile) { Run(tile); }
#endif
void RunAnywhere(DenseTile& tile) { Run(tile); }

}  // namespace

void RunDenseTile(DenseTile& tile) {
  using Loops = void (*)(DenseTile&);
  static const Loops loops = [] {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
      return &RunAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &RunAvx2;
#endif
    return &RunAnywhere;
  }();
  loops(tile);
}

}  // namespace kvtide::testing
