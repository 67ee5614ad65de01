// Merges the partial states of a call: one warp for each output row. Sums of sources with the same V rotation are added in
// the rotated frame, turned back once, and joined; then sinks, normalisation and the natural log-sum-exp.
// An empty row gives output 0 and -inf.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/attend_plan.h"
#include "kernels/cuda/warp_row.cuh"

namespace kvtide::cuda {

constexpr int kCombineWarps = 4;

template <int DV>
__global__ void __launch_bounds__(32 * kCombineWarps) CombineKernel(const __grid_constant__ CombineParams params) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int lane = DeviceWarp::Lane();
  const int job = static_cast<int>(blockIdx.x) * kCombineWarps + static_cast<int>(threadIdx.x >> 5);
  const int group_index = job / params.rows, r = job % params.rows;
  if (group_index >= params.group_count) return;
  const CombineGroup& group = params.groups[group_index];
  if (r >= group.rows) return;
  const int index = group.first_row + r, query = index / group.rows_per_query, head = index % group.rows_per_query;
  const float sink = group.sinks != nullptr ? group.sinks[head] * 1.4426950408889634f : -INFINITY;

  float reference = sink;
  for (uint32_t s = 0; s < group.sources; s++) {
    const CombineSource& source = params.sources[group.first_source + s];
    for (uint32_t p = static_cast<uint32_t>(lane); p < source.slots; p += 32) {
      const float2 v = source.sums[p * source.slot_rows + r];
      if (v.y > 0) reference = fmaxf(reference, v.x);
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) reference = fmaxf(reference, DeviceWarp::ShflXor(reference, mask));

  constexpr int kBlocks = WarpRow<DV>::kBlocks;
  WarpRow<DV> total, part;
#pragma unroll
  for (int b = 0; b < kBlocks; b++)
#pragma unroll
    for (int i = 0; i < 4; i++) total.x[b][i] = part.x[b][i] = 0;
  float sum = sink == -INFINITY ? 0.0f : exp2f(sink - reference);
  for (uint32_t s = 0; s < group.sources; s++) {
    const CombineSource& source = params.sources[group.first_source + s];
#pragma unroll 4
    for (uint32_t p = 0; p < source.slots; p++) {
      const size_t slot = static_cast<size_t>(p) * source.slot_rows + r;
      const float2 v = source.sums[slot];
      const float weight = v.y > 0 ? exp2f(v.x - reference) : 0.0f;
      sum += v.y * weight;
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        const int dim = 128 * b + 4 * lane;
        if (dim >= DV) continue;
        const float4 o = *reinterpret_cast<const float4*>(source.outputs + slot * DV + dim);
        part.x[b][0] += weight * o.x;
        part.x[b][1] += weight * o.y;
        part.x[b][2] += weight * o.z;
        part.x[b][3] += weight * o.w;
      }
    }
    const bool last = s + 1 == group.sources;
    if (!last && params.sources[group.first_source + s + 1].v_rotation == source.v_rotation) continue;
    Rotate<DV, true>(source.v_rotation, part);
#pragma unroll
    for (int b = 0; b < kBlocks; b++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        total.x[b][i] += part.x[b][i];
        part.x[b][i] = 0;
      }
  }

  const float normal = sum > 0 ? 1.0f / sum : 0.0f;
  const int64_t out = query * group.output_stride + static_cast<int64_t>(head) * params.head_dim;
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    const int dim = 128 * b + 4 * lane;
    if (dim >= params.head_dim) continue;
    const float(&x)[4] = total.x[b];
    if (params.output_type == QueryType::kF32) {
      *reinterpret_cast<float4*>(static_cast<float*>(group.output) + out + dim) =
          make_float4(x[0] * normal, x[1] * normal, x[2] * normal, x[3] * normal);
    } else {
      uint2 packed;
      if (params.output_type == QueryType::kF16) {
        packed.x = DeviceWarp::Pack<false>(x[0] * normal, x[1] * normal);
        packed.y = DeviceWarp::Pack<false>(x[2] * normal, x[3] * normal);
      } else {
        packed.x = DeviceWarp::Pack<true>(x[0] * normal, x[1] * normal);
        packed.y = DeviceWarp::Pack<true>(x[2] * normal, x[3] * normal);
      }
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(group.output) + out + dim) = packed;
    }
  }
  if (lane == 0) group.lse[query * group.lse_stride + head] = sum > 0 ? (reference + log2f(sum)) * 0.69314718056f : -INFINITY;
}

}  // namespace kvtide::cuda
