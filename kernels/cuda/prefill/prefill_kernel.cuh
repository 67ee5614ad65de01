// The prefill kernel for any GPU: one CTA for one part, some query rows over a run of decoded tiles. K and V
// tiles come through two stages each, filled while the tile before is computed; warps meet only at the
// stages. And the merge of parts.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/prefill/prefill_rows.cuh"

namespace kvtide::cuda {

template <int D>
struct PrefillConfig {
  static constexpr int kTilesOfRows = D <= 128 ? 2 : 1;  // of 16 rows, for a warp
  static constexpr int kQueryRows = 128, kRowsAtOnce = 4;
  using Tile = PrefillTile<DeviceWarp, D, kTilesOfRows, kQueryRows>;
  static constexpr int kWarps = kQueryRows / Tile::kRows, kThreads = 32 * kWarps;
  static constexpr int kCtas = D <= 128 ? 2 : 1, kPages = 1;
  static constexpr int kQueryBytes = kQueryRows * D * 2;
  static constexpr int kStagesAt = kQueryBytes;  // K0, K1, V0, V1
  static constexpr int kScalesAt = kStagesAt + 4 * Tile::kTileBytes;
  static constexpr int kBarriersAt = kScalesAt + kQueryRows * 4;
  static constexpr int kSharedBytes = kBarriersAt + 8 * 8 + 1024;  // and what the alignment may take
};

// Two stages of K tiles and two of V tiles: `full` counts the copy, `empty` the warps that are done with a
// stage.
template <class Config>
struct TileStages {
  static constexpr int kBytes = Config::Tile::kTileBytes;
  uint32_t buffer, barriers;

  KVTIDE_DEVICE uint32_t Full(int stage) const { return barriers + 16 * stage; }
  KVTIDE_DEVICE uint32_t Empty(int stage) const { return barriers + 16 * stage + 8; }

  KVTIDE_DEVICE void Init() const {  // by one thread
    for (int stage = 0; stage < 4; stage++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(Full(stage)),
                   "n"(kBulk ? 1 : Config::kThreads)
                   : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(Empty(stage)), "n"(kEmptyArrivals)
                   : "memory");
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  static KVTIDE_DEVICE void Wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
#if __CUDA_ARCH__ >= 900
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p,[%1],%2;\nselp.u32 %0,1,0,p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
#else
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p,[%1],%2;\nselp.u32 %0,1,0,p;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
#endif
    } while (!done);
  }
  // Starts the copy of page `page` (of the part) into a stage: `side` 0 for K, 1 for V. Called by all
  // threads.
  KVTIDE_DEVICE void Issue(const std::byte* tiles, int side, int page) const {
    const int stage = 2 * side + page % 2;
    const std::byte* const source = tiles + static_cast<size_t>(2 * page + side) * kBytes;
    const uint32_t target = buffer + stage * kBytes;
    const uint32_t round = static_cast<uint32_t>(page / 2);
    if constexpr (kBulk) {
      if (threadIdx.x != 0) return;
      if (page >= 2) Wait(Empty(stage), (round - 1) & 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(Full(stage)), "n"(kBytes)
                   : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
              target),
          "l"(source), "n"(kBytes), "r"(Full(stage))
          : "memory");
    } else {
      if (page >= 2) Wait(Empty(stage), (round - 1) & 1);
      for (int i = static_cast<int>(threadIdx.x) * 16; i < kBytes; i += Config::kThreads * 16)
        asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(target + i), "l"(source + i) : "memory");
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(Full(stage)) : "memory");
    }
  }
  KVTIDE_DEVICE uint32_t Await(int side, int page) const {
    const int stage = 2 * side + page % 2;
    Wait(Full(stage), static_cast<uint32_t>(page / 2) & 1);
    return buffer + stage * kBytes;
  }
  KVTIDE_DEVICE void Release(int side, int page) const {
    __syncwarp();
    if (!kBulk || DeviceWarp::Lane() == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(Empty(2 * side + page % 2)) : "memory");
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr bool kBulk = false;
#else
  static constexpr bool kBulk = true;
#endif
  // Lane 0 is enough; where other threads fill the stage again, racecheck sees only lanes that arrive.
  static constexpr int kEmptyArrivals = kBulk ? Config::kWarps : Config::kThreads;
};

template <class Config, int D>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    PrefillKernelFunction(const __grid_constant__ PrefillParams params) {
  using Tile = typename Config::Tile;
  constexpr int MT = Config::kTilesOfRows;
  extern __shared__ uint8_t unaligned[];
  uint8_t* const shared =
      unaligned + (1024 - (static_cast<uint32_t>(__cvta_generic_to_shared(unaligned)) & 1023)) % 1024;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int warp = static_cast<int>(threadIdx.x) >> 5, n = DeviceWarp::Lane() >> 2;
  const PrefillPart part = params.parts[blockIdx.x];
  const TileStages<Config> stages{base + Config::kStagesAt, base + Config::kBarriersAt};
  if (threadIdx.x == 0) stages.Init();
  __syncthreads();
  stages.Issue(part.tiles, 0, 0);
  stages.Issue(part.tiles, 1, 0);
  auto* const scales = reinterpret_cast<float*>(shared + Config::kScalesAt);
  LoadQueries<Config, D>(params, part, shared, scales, warp);
  // What all rows of the warp see, and what any does.
  const int first_row = warp * Tile::kRows;
  const RowLimits first = LimitsOf(part, first_row), last = LimitsOf(part, first_row + Tile::kRows - 1);
  const float softcap = params.softcap;

  Tile tile;
  tile.Reset();
  const uint32_t query = base + first_row * 128;
#pragma unroll 1
  for (int page = 0; page < part.page_count; page++) {
    const int begin = page * kBlockTokens, end = begin + kBlockTokens;
    const bool visible = begin < last.end && end > first.begin;
    if (page + 1 < part.page_count) stages.Issue(part.tiles, 0, page + 1);
    float logits[MT][Tile::kGroups][4];
    const uint32_t keys = stages.Await(0, page);
    if (visible) tile.KeyStage(query, keys, logits);
    stages.Release(0, page);
    if (page + 1 < part.page_count) stages.Issue(part.tiles, 1, page + 1);
    uint32_t weights[MT][Tile::kGroups / 2][4];
    if (visible) {
      float multiplier[MT][2];
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) multiplier[m][h] = scales[first_row + 16 * m + n + 8 * h];
      if (softcap > 0) Tile::Cap(softcap, multiplier, logits);
      if (begin < last.begin || end > first.end) {
        RowLimits limits[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int h = 0; h < 2; h++) limits[m][h] = LimitsOf(part, first_row + 16 * m + n + 8 * h);
        Tile::Mask(begin, limits, logits);
      }
      tile.Weigh(logits, multiplier, weights);
    }
    const uint32_t values = stages.Await(1, page);
    if (visible) tile.ValueStage(values, weights);
    stages.Release(1, page);
  }
  WriteRows<Config, D>(params, part, tile, first_row);
}

// One warp for each row: partial states of this launch, and the state that output and lse hold from launches
// before.
template <int D>
__global__ void __launch_bounds__(32 * kMergeWarps)
    PrefillMergeFunction(const __grid_constant__ PrefillMergeParams params) {
  constexpr float kLog2E = 1.4426950408889634f;
  const int lane = DeviceWarp::Lane();
  const int job = static_cast<int>(blockIdx.x) * kMergeWarps + (static_cast<int>(threadIdx.x) >> 5);
  if (job / params.rows >= params.group_count) return;
  const PrefillGroup& group = params.groups[job / params.rows];
  const int r = job % params.rows;
  if (r >= group.rows || (!group.fresh && group.slots == 0)) return;
  const GroupRow row(group, r, params.head_dim);
  float* const out = row.out;
  const float before = group.fresh ? row.Sink() : *row.lse * kLog2E;
  float reference = before;
  for (uint32_t s = static_cast<uint32_t>(lane); s < group.slots; s += 32) {
    const float2 v = params.sums[static_cast<size_t>(params.slots[group.first_slot + s]) * params.rows + r];
    if (v.y > 0) reference = fmaxf(reference, v.x);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) reference = fmaxf(reference, DeviceWarp::ShflXor(reference, mask));
  float sum = before == -INFINITY ? 0.0f : exp2f(before - reference);
  float2 total[D / 64];
#pragma unroll
  for (int b = 0; b < D / 64; b++) {
    const int dim = 64 * b + 2 * lane;
    total[b] = make_float2(0, 0);
    if (!group.fresh && dim < params.head_dim) {
      const float2 x = *reinterpret_cast<const float2*>(out + dim);
      total[b] = make_float2(x.x * sum, x.y * sum);
    }
  }
#pragma unroll 2
  for (uint32_t s = 0; s < group.slots; s++) {
    const size_t slot = static_cast<size_t>(params.slots[group.first_slot + s]) * params.rows + r;
    const float2 v = params.sums[slot];
    const float weight = v.y > 0 ? exp2f(v.x - reference) : 0.0f;
    sum += v.y * weight;
#pragma unroll
    for (int b = 0; b < D / 64; b++) {
      const float2 x = *reinterpret_cast<const float2*>(params.outputs + slot * D + 64 * b + 2 * lane);
      total[b].x += weight * x.x;
      total[b].y += weight * x.y;
    }
  }
  const float normal = sum > 0 ? 1.0f / sum : 0.0f;
#pragma unroll
  for (int b = 0; b < D / 64; b++) {
    const int dim = 64 * b + 2 * lane;
    if (dim < params.head_dim)
      *reinterpret_cast<float2*>(out + dim) = make_float2(total[b].x * normal, total[b].y * normal);
  }
  if (lane == 0) row.WriteLse(reference, sum);
}

}  // namespace kvtide::cuda
