// What the prefill kernels share: the query rows of a part, brought into shared memory by the warps that
// compute them, what each row sees, and the state that a part leaves.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/prefill/prefill_plan.h"
#include "kernels/cuda/prefill/prefill_tile.h"

namespace kvtide::cuda {

// The warp's rows of queries: halves of q / 2^e in the order of a tile, and |scale| * 2^e; the sign of the
// scale is the rows'. A power of two keeps queries that were f16 exact.
template <class Config, int D>
KVTIDE_DEVICE void LoadQueries(const PrefillParams& params, const PrefillPart& part, uint8_t* area,
                               float* scales, int warp) {
  constexpr int kRows = Config::Tile::kRows, kAtOnce = Config::kRowsAtOnce;
  const int lane = DeviceWarp::Lane();
  for (int begin = 0; begin < kRows; begin += kAtOnce) {
    float2 x[kAtOnce][D / 64];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int r = warp * kRows + begin + k, index = part.first_row + r;
      const int query = index / part.rows_per_query, head = index % part.rows_per_query;
      const float* const row =
          part.query + query * part.query_stride + static_cast<int64_t>(head) * params.head_dim;
#pragma unroll
      for (int b = 0; b < D / 64; b++) {
        const int dim = 64 * b + 2 * lane;
        x[k][b] = r < part.rows && dim < params.head_dim ? *reinterpret_cast<const float2*>(row + dim)
                                                         : make_float2(0, 0);
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int r = warp * kRows + begin + k;
      float top = 0;
#pragma unroll
      for (int b = 0; b < D / 64; b++) top = fmaxf(top, fmaxf(fabsf(x[k][b].x), fabsf(x[k][b].y)));
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, DeviceWarp::ShflXor(top, mask));
      // 2^-e, with the scale's sign, and 2^e with top < 2^e.
      const uint32_t exponent = __float_as_uint(top) >> 23;
      const float inverse = copysignf(__uint_as_float((253u - exponent) << 23), params.scale),
                  power = __uint_as_float((exponent + 1u) << 23);
#pragma unroll
      for (int b = 0; b < D / 64; b++) {
        const int at = TileIndex(r, 64 * b + 2 * lane, Config::kQueryRows) * 2;
        *reinterpret_cast<uint32_t*>(area + at) =
            DeviceWarp::Pack<false>(x[k][b].x * inverse, x[k][b].y * inverse);
      }
      if (lane == 0) scales[r] = fmaxf(fabsf(params.scale) * power, 1e-30f);
    }
  }
  __syncwarp();
}

// Where the result of row `r` of a group goes.
struct GroupRow {
  float *out, *lse;
  const float* sink;

  KVTIDE_DEVICE GroupRow(const PrefillGroup& group, int r, int value_dim) {
    const int index = group.first_row + r, query = index / group.rows_per_query,
              head = index % group.rows_per_query;
    out = group.output + query * group.output_stride + static_cast<int64_t>(head) * value_dim;
    lse = group.lse + query * group.lse_stride + head;
    sink = group.sinks == nullptr ? nullptr : group.sinks + head;
  }
  KVTIDE_DEVICE float Sink() const { return sink == nullptr ? -INFINITY : *sink * 1.4426950408889634f; }
  KVTIDE_DEVICE void WriteLse(float reference, float sum) const {
    *lse = sum > 0 ? (reference + log2f(sum)) * 0.6931471805599453f : -INFINITY;
  }
};

// What row `r` of a part sees; rows past the end are computed like the last one.
KVTIDE_DEVICE RowLimits LimitsOf(const PrefillPart& part, int r) {
  const int query = (part.first_row + min(r, part.rows - 1)) / part.rows_per_query;
  return {part.window_begin + query, min(part.tokens, part.causal_end + query)};
}

// Leaves the state of the warp's rows, the first of which is `first_row`, in the slot of the CTA.
template <class Config, int D>
KVTIDE_DEVICE void WriteState(const PrefillParams& params, int rows, const typename Config::Tile& tile,
                              int first_row) {
  const int lane = DeviceWarp::Lane(), n = lane >> 2, c = lane & 3;
#pragma unroll
  for (int m = 0; m < Config::Tile::kRows / 16; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = first_row + 16 * m + n + 8 * h;
      if (r >= rows) continue;
      const size_t row = static_cast<size_t>(blockIdx.x) * Config::kQueryRows + r;
      if (c == 0) params.sums[row] = make_float2(tile.Reference(m, h), tile.sum[m][h]);
#pragma unroll
      for (int j = 0; j < D / 8; j++)
        *reinterpret_cast<float2*>(params.outputs + row * D + 8 * j + 2 * c) =
            make_float2(tile.output[m][j][2 * h], tile.output[m][j][2 * h + 1]);
    }
}

// Writes the rows' output, where there is no other part to merge with.
template <class Config, int D>
KVTIDE_DEVICE void WriteOutput(const PrefillParams& params, const PrefillGroup& group,
                               const typename Config::Tile& tile, int first_row) {
  const int lane = DeviceWarp::Lane(), n = lane >> 2, c = lane & 3;
#pragma unroll
  for (int m = 0; m < Config::Tile::kRows / 16; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = first_row + 16 * m + n + 8 * h;
      if (r >= group.rows) continue;
      const GroupRow row(group, r, params.value_dim);
      // A sink counts as a state of output 0.
      const float sink = row.Sink(), sum = tile.sum[m][h];
      const float reference = fmaxf(sink, sum > 0 ? tile.Reference(m, h) : -INFINITY);
      const float weight = sum > 0 ? exp2f(tile.Reference(m, h) - reference) : 0.0f;
      const float total = sum * weight + (sink == -INFINITY ? 0.0f : exp2f(sink - reference));
      if (c == 0) row.WriteLse(reference, total);
      const float factor = total > 0 ? weight / total : 0.0f;
#pragma unroll
      for (int j = 0; j < D / 8; j++)
        if (8 * j + 2 * c < params.value_dim)
          *reinterpret_cast<float2*>(row.out + 8 * j + 2 * c) =
              make_float2(tile.output[m][j][2 * h] * factor, tile.output[m][j][2 * h + 1] * factor);
    }
}

template <class Config, int D>
KVTIDE_DEVICE void WriteRows(const PrefillParams& params, const PrefillPart& part,
                             typename Config::Tile& tile, int first_row) {
  tile.Finish();
  if (part.group < 0) {
    WriteState<Config, D>(params, part.rows, tile, first_row);
  } else {
    WriteOutput<Config, D>(params, params.groups[part.group], tile, first_row);
  }
}

}  // namespace kvtide::cuda
