// The prefill kernel for compute capability 9.0: one CTA for one part, over f16 pages where they lie. Its
// warps have roles: one copies tiles, two or three warpgroups compute 64 rows each. A warpgroup begins the
// products of the next keys and of the last weights with their values, and weighs the logits while the second
// goes on; warpgroups take turns at beginning products, so that one multiplies while another weighs.
#pragma once

#include "kernels/cuda/device/pipeline.cuh"
#include "kernels/cuda/prefill/prefill_rows.cuh"
#include "kernels/cuda/prefill/prefill_warpgroup.cuh"

namespace kvtide::cuda {

template <int D>
struct OverlapConfig {
  // At dim 64 the weights of 128 tokens leave room for three warpgroups of 160 registers, elsewhere for two
  // of 240.
  static constexpr int kConsumers = D == 64 ? 3 : 2;

  static constexpr int kCopierRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static constexpr int kQueryRows = 64 * kConsumers, kTokens = D <= 128 ? 128 : 64;
  static constexpr int kRowsAtOnce = 16;
  static constexpr bool kTurns = D <= 128;

  using Tile = WarpgroupTile<D, kQueryRows, kTokens>;
  static constexpr int kWarpsTogether = Tile::kRowsTogether / 16;
  static constexpr int kThreads = 128 * (1 + kConsumers), kCtas = 1;
  static constexpr int kPages = kTokens / kBlockTokens;  // of a tile
  static constexpr int kQueryBytes = kQueryRows * D * 2;
  static constexpr int kStagesAt = kQueryBytes;  // K0, K1, V0, V1
  static constexpr int kScalesAt = kStagesAt + 4 * Tile::kTileBytes;
  static constexpr int kLimitsAt = kScalesAt + kQueryRows * 4;
  static constexpr int kBarriersAt = kLimitsAt + kQueryRows * static_cast<int>(sizeof(RowLimits));
  static constexpr int kSharedBytes = kBarriersAt + 8 * 8 + 1024;  // and what the alignment may take
};

// Two stages of K tiles and two of V tiles: `full` counts the copies, `empty` the warps that are done with a
// stage. A page comes in boxes of 64 dims, each of which goes to its tokens of a sub-tile of the stage.
template <class Config, int D>
struct OverlapStages {
  static constexpr int kBoxBytes = kBlockTokens * 128;
  uint32_t buffer, barriers;

  KVTIDE_DEVICE uint32_t Full(int stage) const { return barriers + 16 * stage; }
  KVTIDE_DEVICE uint32_t Empty(int stage) const { return barriers + 16 * stage + 8; }
  static KVTIDE_DEVICE int Stage(int side, int step) { return 2 * side + step % 2; }
  static KVTIDE_DEVICE uint32_t Parity(int step) { return static_cast<uint32_t>(step / 2) & 1; }

  KVTIDE_DEVICE void Init() const {  // by one thread
    for (int stage = 0; stage < 4; stage++) {
      Barrier::Init(Full(stage), Config::kPages * (D / 64));
      Barrier::Init(Empty(stage), 4 * Config::kConsumers);
    }
    Barrier::FenceInit();
  }
  // Starts the copies of a step's pages, `side` 0 for K, 1 for V, by one thread.
  KVTIDE_DEVICE void Issue(const PageMaps& maps, int side, int step,
                           const PagePlace (&places)[Config::kPages]) const {
    const int stage = Stage(side, step);
    if (step >= 2) Barrier::Wait(Empty(stage), Parity(step - 2));
    const uint32_t target = buffer + stage * Config::Tile::kTileBytes;
#pragma unroll
    for (int p = 0; p < Config::kPages; p++) {
      const bool scratch = (places[p] & kScratchPlace) != 0;
      const uint32_t row = (places[p] & ~kScratchPlace) + static_cast<uint32_t>(side * kBlockTokens);
#pragma unroll
      for (int b = 0; b < D / 64; b++)
        CopyBox(target + (b * Config::kPages + p) * kBoxBytes, scratch ? &maps.scratch : &maps.blocks, 64 * b,
                row, kBoxBytes, Full(stage));
    }
  }
  KVTIDE_DEVICE uint32_t Await(int side, int step) const {
    const int stage = Stage(side, step);
    Barrier::Wait(Full(stage), Parity(step));
    return buffer + stage * Config::Tile::kTileBytes;
  }
  KVTIDE_DEVICE void Release(int side, int step) const {
    __syncwarp();
    if (DeviceWarp::Lane() == 0) Barrier::Arrive(Empty(Stage(side, step)));
  }
};

// Named barriers: 1, 2, ... for the warps of a warpgroup, and behind them the turns: a warpgroup waits for
// the one before it.
template <class Config>
struct OverlapTurns {
  static constexpr int kCount = Config::kConsumers;
  int consumer;

  KVTIDE_DEVICE void Meet() const { asm volatile("bar.sync %0,128;" ::"r"(1 + consumer) : "memory"); }
  KVTIDE_DEVICE void Start() const {
    if (consumer == kCount - 1) Pass();
  }
  KVTIDE_DEVICE void Await() const {
    if constexpr (Config::kTurns) asm volatile("bar.sync %0,256;" ::"r"(1 + kCount + consumer) : "memory");
  }
  KVTIDE_DEVICE void Pass() const {
    if constexpr (Config::kTurns)
      asm volatile("bar.arrive %0,256;" ::"r"(1 + kCount + (consumer + 1) % kCount) : "memory");
  }
};

template <int kRegisters>
KVTIDE_DEVICE void GiveRegisters() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
KVTIDE_DEVICE void TakeRegisters() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// What all lanes have: the compiler learns it, and keeps it in a uniform register.
KVTIDE_DEVICE int SameInWarp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

template <class Config, int D>
KVTIDE_DEVICE void CopyPages(const PrefillParams& params, const PrefillPart& part,
                             const OverlapStages<Config, D>& stages, int steps) {
  const PagePlace* const pages = part.pages;
  const int last = part.page_count - 1;
  // Behind the last page comes the last again: nothing sees it, but it must be numbers.
  const auto places_of = [&](int step, PagePlace(&places)[Config::kPages]) {
#pragma unroll
    for (int p = 0; p < Config::kPages; p++) places[p] = pages[min(step * Config::kPages + p, last)];
  };
  PagePlace places[Config::kPages], next[Config::kPages];
  places_of(0, places);
  stages.Issue(params.maps, 0, 0, places);
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    places_of(step + 1, next);  // before the wait for a stage
    if (step + 1 < steps) stages.Issue(params.maps, 0, step + 1, next);
    stages.Issue(params.maps, 1, step, places);
#pragma unroll
    for (int p = 0; p < Config::kPages; p++) places[p] = next[p];
  }
}

template <class Config, int D>
KVTIDE_DEVICE void ComputeRows(const PrefillParams& params, const PrefillPart& part,
                               const OverlapStages<Config, D>& stages, uint8_t* shared, uint32_t base,
                               int steps) {
  using Tile = typename Config::Tile;
  const int warp = SameInWarp(static_cast<int>(threadIdx.x) / 32) - 4;
  const int n = DeviceWarp::Lane() >> 2;
  const OverlapTurns<Config> turns{warp / 4};
  auto* const scales = reinterpret_cast<float*>(shared + Config::kScalesAt);
  auto* const limits = reinterpret_cast<RowLimits*>(shared + Config::kLimitsAt);
  LoadQueries<Config, D>(params, part, shared, scales, warp);
  if (DeviceWarp::Lane() < 16)
    limits[warp * 16 + DeviceWarp::Lane()] = LimitsOf(part, warp * 16 + DeviceWarp::Lane());
  LetCopiesOverwrite();  // wgmma reads like them
  turns.Meet();
  const int first_row = warp / 4 * 64, warp_row = warp * 16;
  // Where the warpgroup's rows see different tokens: all see those from `low` to before `high`.
  const int low = limits[first_row + 63].begin, high = limits[first_row].end;
  const uint32_t query = base + static_cast<uint32_t>(warp / Config::kWarpsTogether) *
                                    static_cast<uint32_t>(Config::kWarpsTogether * 16 * 128);
  float multiplier[1][2];
#pragma unroll
  for (int h = 0; h < 2; h++) multiplier[0][h] = scales[warp_row + n + 8 * h];
  const float softcap = params.softcap;
  const auto finish_logits = [&](int step, float(&logits)[1][Tile::kGroups][4]) {
    if (softcap > 0) Tile::Cap(softcap, multiplier, logits);
    const int begin = step * Config::kTokens;
    if (begin < low || begin + Config::kTokens > high) {
      const RowLimits rows[1][2] = {{limits[warp_row + n], limits[warp_row + n + 8]}};
      Tile::Mask(begin, rows, logits);
    }
  };

  Tile tile;
  tile.Reset();
  float logits[1][Tile::kGroups][4] = {};
  uint32_t weights[1][Tile::kGroups / 2][4];
  float factors[1][2];
  uint32_t keys = stages.Await(0, 0);
  Tile::Open();
  tile.BeginKeys(query, keys, logits);
  Tile::template AwaitKeys<0>(logits);
  stages.Release(0, 0);
  finish_logits(0, logits);
  tile.Raise(logits, multiplier, factors);  // there is no output to rescale
  tile.Exponentials(logits, multiplier);
  Tile::Pack(logits, weights);
  if (steps > 1) {
    turns.Start();
    keys = stages.Await(0, 1);
  }
#pragma unroll 1
  for (int step = 1; step < steps; step++) {
    const uint32_t values = stages.Await(1, step - 1);
    turns.Await();
    Tile::Open();
    tile.BeginKeys(query, keys, logits);
    tile.BeginValues(values, weights);
    if (turns.consumer < turns.kCount - 1 || step + 1 < steps) turns.Pass();
    Tile::template AwaitKeys<1>(logits);
    stages.Release(0, step);
    finish_logits(step, logits);
    const bool raised = tile.Raise(logits, multiplier, factors);
    tile.Exponentials(logits, multiplier);
    Tile::Settle(logits);
    // They are there. Waiting here, and not above, ends a block of instructions: otherwise the compiler puts
    // the exponentials behind the wait for the values.
    if (step + 1 < steps) keys = stages.Await(0, step + 1);
    tile.AwaitValues(weights);
    stages.Release(1, step - 1);
    if (raised) tile.Rescale(factors);
    Tile::Pack(logits, weights);
  }
  const uint32_t values = stages.Await(1, steps - 1);
  Tile::Open();
  tile.BeginValues(values, weights);
  tile.AwaitValues(weights);
  WriteRows<Config, D>(params, part, tile, warp_row);
}

template <class Config, int D>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    OverlapKernelFunction(const __grid_constant__ PrefillParams params) {
  if constexpr (HasWarpgroups(kThisCapability)) {
    extern __shared__ uint8_t unaligned[];
    uint8_t* const shared = unaligned + (1024 - (SharedAddress(unaligned) & 1023)) % 1024;
    const uint32_t base = SharedAddress(shared);
    const PrefillPart& part = params.parts[blockIdx.x];  // not kept in registers
    const int steps = (part.page_count + Config::kPages - 1) / Config::kPages;
    const OverlapStages<Config, D> stages{base + Config::kStagesAt, base + Config::kBarriersAt};
    if (threadIdx.x == 0) stages.Init();
    __syncthreads();
    if (threadIdx.x < 128) {
      GiveRegisters<Config::kCopierRegisters>();
      if (threadIdx.x == 0) CopyPages<Config, D>(params, part, stages, steps);
    } else {
      TakeRegisters<Config::kConsumerRegisters>();
      ComputeRows<Config, D>(params, part, stages, shared, base, steps);
    }
  }
}

}  // namespace kvtide::cuda
