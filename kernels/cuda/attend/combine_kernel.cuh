// Merges the partial states of a call. A team of 1, 2 or 4 warps serves one output row: every member takes
// slots in turn and loads several at once; two sources, as of a sequence with coded and f16 pages, are read
// side by side, each by a part of the team. Sums of sources with the same V rotation are added in the rotated
// frame and turned back once; then the members are joined in their order, and sinks, normalisation and the
// natural log-sum-exp follow. An empty row gives output 0 and -inf.
//
// What the plan says is loaded before the kernel waits for the attention kernels: only partial states come
// from them.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/attend/attend_plan.h"
#include "kernels/cuda/attend/scatter_combine.h"
#include "kernels/cuda/attend/warp_row.cuh"
#include "kernels/cuda/device/pipeline.cuh"

namespace kvtide::cuda {

// kFew: no group has a team; fewer registers then let more rows be under way.
template <int DV, bool kFew>
struct MergedRow {
  static constexpr int kBlocks = WarpRow<DV>::kBlocks, kBatch = kFew || kBlocks > 1 ? 2 : 6;
  float reference = -INFINITY, sum = 0;
  WarpRow<DV> part;  // in the rotated frame of the sources at hand

  KVTIDE_DEVICE void Clear() {
#pragma unroll
    for (int b = 0; b < kBlocks; b++)
#pragma unroll
      for (int i = 0; i < 4; i++) part.x[b][i] = 0;
  }
  // The factor for what was added so far when `top` becomes the reference.
  KVTIDE_DEVICE float Raise(float top) {
    const float decay = top == reference ? 1.0f : exp2f(reference - top);
    reference = top;
    sum *= decay;
    return decay;
  }
};

// Adds the slots of a source that are `member`'s turn; `first` = this lane's entry of the first 32 in the
// slot list.
template <int DV, bool kFew>
KVTIDE_DEVICE void AddSource(const CombineSource& source, const std::byte* partials, int r, int member,
                             int team, uint32_t first, MergedRow<DV, kFew>& row, WarpRow<DV>& total) {
  constexpr int kBlocks = MergedRow<DV, kFew>::kBlocks, kBatch = MergedRow<DV, kFew>::kBatch;
  const int lane = DeviceWarp::Lane(), slots = static_cast<int>(source.slots);
  const auto* const outputs = reinterpret_cast<const float*>(partials + source.outputs);
  const auto* const sums = reinterpret_cast<const StateHead*>(partials + source.sums);
  uint32_t mine = first;
  for (int begin = member; begin < slots; begin += 32 * team) {
    if (begin != member) mine = begin + team * lane < slots ? source.slot_list[begin + team * lane] : 0;
    const int count = min(32, (slots - begin + team - 1) / team);
    for (int i = 0; i < count; i += kBatch) {
      float2 head[kBatch];
      float4 out[kBatch][kBlocks];
#pragma unroll
      for (int u = 0; u < kBatch; u++) {
        const size_t slot =
            static_cast<size_t>(__shfl_sync(0xffffffffu, mine, min(i + u, count - 1))) * source.slot_rows + r;
        const StateHead stored = i + u < count ? sums[slot] : StateHead{0, 0};
        head[u] = make_float2(stored.reference, stored.sum);
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
          out[u][b] = make_float4(0, 0, 0, 0);
          if (128 * b + 4 * lane < DV && i + u < count)
            out[u][b] = *reinterpret_cast<const float4*>(outputs + slot * DV + 128 * b + 4 * lane);
        }
      }
      float top = row.reference;
#pragma unroll
      for (int u = 0; u < kBatch; u++)
        if (head[u].y > 0) top = fmaxf(top, head[u].x);
      const float decay = row.Raise(top);
#pragma unroll
      for (int b = 0; b < kBlocks; b++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          row.part.x[b][e] *= decay;
          total.x[b][e] *= decay;
        }
#pragma unroll
      for (int u = 0; u < kBatch; u++) {
        const float weight = head[u].y > 0 ? exp2f(head[u].x - top) : 0.0f;
        // A state whose reference is not finite makes the sum no number, as one does whose sum is none.
        row.sum += head[u].y * weight + (head[u].x - head[u].x);
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
          row.part.x[b][0] += weight * out[u][b].x;
          row.part.x[b][1] += weight * out[u][b].y;
          row.part.x[b][2] += weight * out[u][b].z;
          row.part.x[b][3] += weight * out[u][b].w;
        }
      }
    }
  }
}

// A row's mark, seen by others (the host, where it lies there) after everything that the warp has written.
KVTIDE_DEVICE void StoreMark(RowMark* to, RowMark mark) {
  __syncwarp();
  if (DeviceWarp::Lane() != 0) return;
  __threadfence_system();
  *reinterpret_cast<volatile uint8_t*>(to) = static_cast<uint8_t>(mark);
}

// place(group, query, head): where the output of that row begins.
template <int DV, bool kFew, class Place>
KVTIDE_DEVICE void CombineBody(const CombineParams& params, Place place) {
  constexpr int kBlocks = WarpRow<DV>::kBlocks;
  __shared__ float4 rows[kFew ? 1 : kCombineWarps][kBlocks][32];
  __shared__ float2 heads[kCombineWarps];
  const int lane = DeviceWarp::Lane(), warp = static_cast<int>(threadIdx.x >> 5);
  const int most_team = kFew ? 1 : params.team, member = warp % most_team;
  const int job = (static_cast<int>(blockIdx.x) * kCombineWarps + warp) / most_team;
  const int group_index = min(job / params.rows, params.group_count - 1), r = job % params.rows;
  const CombineGroup& group = params.groups[group_index];
  const int team =
      kFew ? 1 : group.team;  // its own: what a group adds in which order is not the business of the others
  const bool active = job / params.rows < params.group_count && r < group.rows && member < team;
  // The sources that are this warp's business, and its place among the warps that share them.
  uint32_t source_begin = 0, source_end = group.sources;
  int turn = member, turns = team;
  if (!kFew && team > 1 && group.sources == 2) {
    const int second = SecondSourceWarps(team, group.first[0].slots, group.first[1].slots);
    if (member < team - second) {
      source_end = 1;
      turns = team - second;
    } else {
      source_begin = 1;
      turn = member - (team - second);
      turns = second;
    }
  }
  const int index = group.first_row + r, query = index / group.rows_per_query,
            head = index % group.rows_per_query;
  CombineSource source;
  uint32_t first = 0;
  const auto load_source = [&](uint32_t s) {
    source = s < 2 ? group.first[s] : params.sources[group.first_source + s];
    const int at = turn + turns * lane;
    if (source.slots <= 4) {
      first = at == 0   ? source.first_slots[0]
              : at == 1 ? source.first_slots[1]
              : at == 2 ? source.first_slots[2]
                        : source.first_slots[3];
    } else {
      first = at < static_cast<int>(source.slots) ? source.slot_list[at] : 0;
    }
  };
  if (active && source_begin < source_end) load_source(source_begin);
  const float sink = active && params.sinks != nullptr
                         ? params.sinks[group.first_head + head] * 1.4426950408889634f
                         : -INFINITY;
  WaitForEarlierKernels();

  MergedRow<DV, kFew> row;
  row.Clear();
  WarpRow<DV> total = row.part;
  if (active) {
    for (uint32_t s = source_begin; s < source_end; s++) {
      AddSource<DV, kFew>(source, params.partials, r, turn, turns, first, row, total);
      const Rotation rotation = source.v_rotation;
      if (s + 1 < source_end) {
        load_source(s + 1);
        if (source.v_rotation == rotation) continue;
      }
      Rotate<DV, true>(rotation, row.part);
#pragma unroll
      for (int b = 0; b < kBlocks; b++)
#pragma unroll
        for (int i = 0; i < 4; i++) total.x[b][i] += row.part.x[b][i];
      row.Clear();
    }
  }
  if (!kFew && most_team > 1) {
    if (lane == 0) heads[warp] = make_float2(row.reference, row.sum);
#pragma unroll
    for (int b = 0; b < kBlocks; b++)
      rows[warp][b][lane] = make_float4(total.x[b][0], total.x[b][1], total.x[b][2], total.x[b][3]);
    __syncthreads();
    if (!active || member != 0) return;
    for (int m = 1; m < team; m++) {
      const float2 other = heads[warp + m];
      if (other.y == 0) continue;
      const float decay = row.Raise(fmaxf(row.reference, other.x)), weight = exp2f(other.x - row.reference);
      row.sum += other.y * weight;
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        const float4 v = rows[warp + m][b][lane];
        total.x[b][0] = total.x[b][0] * decay + v.x * weight;
        total.x[b][1] = total.x[b][1] * decay + v.y * weight;
        total.x[b][2] = total.x[b][2] * decay + v.z * weight;
        total.x[b][3] = total.x[b][3] * decay + v.w * weight;
      }
    }
  }
  if (!active) return;

  const RowMark mark = row.sum == 0                        ? RowMark::kNothing
                       : row.sum > 0 && row.sum < INFINITY ? RowMark::kSum
                                                           : RowMark::kBeyond;
  float sum = row.sum, normal = 0, reference = row.reference;
  if (sink > -INFINITY) {
    const float decay = row.Raise(fmaxf(reference, sink));
    sum = row.sum + exp2f(sink - row.reference);
    reference = row.reference;
    normal = decay / sum;
  } else if (sum > 0) {
    normal = 1.0f / sum;
  }
  void* const out = place(group, query, head);
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    const int dim = 128 * b + 4 * lane;
    if (dim >= params.head_dim) continue;
    const float(&x)[4] = total.x[b];
    if (params.output_type == QueryType::kF32) {
      *reinterpret_cast<float4*>(static_cast<float*>(out) + dim) =
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
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out) + dim) = packed;
    }
  }
  const int64_t at = group.first_lse + query * group.lse_stride + head;
  if (lane == 0) params.lse[at] = sum > 0 ? (reference + log2f(sum)) * 0.69314718056f : -INFINITY;
  if (params.marks != nullptr) StoreMark(params.marks + at, mark);
}

// Few rows a team: how many CTAs share an SM.
template <int DV, bool kFew>
inline constexpr int kCombineCtas = kFew&& DV <= 128 ? 8
                                    : DV <= 128      ? 5
                                                     : 4;

KVTIDE_DEVICE int64_t OutputBytes(const CombineParams& params) {
  return params.output_type == QueryType::kF32 ? 4 : 2;
}

template <int DV, bool kFew>
__global__ void __launch_bounds__(32 * kCombineWarps, kCombineCtas<DV, kFew>)
    CombineKernel(const __grid_constant__ CombineParams params) {
  CombineBody<DV, kFew>(params, [&](const CombineGroup& group, int query, int head) {
    const int64_t at =
        group.first_output + query * group.output_stride + static_cast<int64_t>(head) * params.head_dim;
    return static_cast<void*>(static_cast<std::byte*>(params.output) + at * OutputBytes(params));
  });
}

template <int DV, bool kFew>
__global__ void __launch_bounds__(32 * kCombineWarps, kCombineCtas<DV, kFew>)
    ScatterCombineKernel(const __grid_constant__ ScatterParams params) {
  CombineBody<DV, kFew>(params.combine, [&](const CombineGroup& group, int query, int head) {
    const auto heads = static_cast<int>(group.lse_stride);
    const int token = (static_cast<int>(group.first_lse) - group.first_head) / heads + query;
    const int64_t at = static_cast<int64_t>(group.first_head + head) * params.combine.head_dim;
    return static_cast<void*>(static_cast<std::byte*>(params.output_rows[token]) +
                              at * OutputBytes(params.combine));
  });
}

}  // namespace kvtide::cuda
