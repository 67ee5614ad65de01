// The decode attention kernel: persistent CTAs, one per SM. Every warp is a worker of its own: it reads an
// equal contiguous share of the pages of the launch behind a ring of copies that runs on over the borders of
// units, and writes a partial state of each unit that ends before its share does. No warp waits for another
// until the end, when the states of the warps that end in the CTA's last unit are added up. Queries come
// prepared from the query kernel. Everything is added in a fixed order: the same call gives the same bits.
#pragma once

#include "kernels/cuda/attend/coded_tile.h"
#include "kernels/cuda/attend/half_tile.h"
#include "kernels/cuda/attend/page_ring.cuh"
#include "kernels/cuda/attend/query_kernel.cuh"

namespace kvtide::cuda {

// What the kernel needs to know of a tile class beside its interface.
template <class Tile>
struct TileInfo;
template <class W, class KCodec, class VCodec, int DK, int DV, int MT>
struct TileInfo<CodedTile<W, KCodec, VCodec, DK, DV, MT>> {
  using Tile = CodedTile<W, KCodec, VCodec, DK, DV, MT>;
  static constexpr int kDk = DK, kDv = DV, kTiles = MT;
  // kRebuilt: the tile makes its keys, page by page, with tables of the unit and memory of the warp's own.
  static constexpr bool kCoded = true, kRebuilt = false;
  static constexpr int kScratchBytes = 0;  // of a warp
  using Query =
      QueryKind<DK, Tile::kRows, KCodec::kGroup, Tile::KDecoder::kOffset, Tile::KDecoder::kInterleaved>;
};
template <class W, bool kBf16, int DK, int DV, int MT, int kTokens>
struct TileInfo<HalfTile<W, kBf16, DK, DV, MT, kTokens>> {
  static constexpr int kDk = DK, kDv = DV, kTiles = MT;
  static constexpr bool kCoded = false, kRebuilt = false;
  static constexpr int kScratchBytes = 0;
  using Query = QueryKind<DK, 8 * MT, kBf16 ? kBf16Query : kF16Query>;
};

// kWhole: pages come in one piece instead of two; fewer instructions, where shared memory allows. kCtaWarps:
// of a CTA in which only the first kWarpsT take part.
template <class Tile, int kWarpsT, int kSlotsT, bool kWhole, int kCtaWarps = kWarpsT>
struct AttendConfig {
  using Info = TileInfo<Tile>;
  using Ring = PieceRing<Tile, kSlotsT, kWhole>;
  static constexpr int kWarps = kWarpsT, kSlots = kSlotsT, kThreads = 32 * kWarps,
                       kCtaThreads = 32 * kCtaWarps;
  static_assert(kWarps <= kMostWarps);
  static constexpr int kRows = Tile::kRows;
  static constexpr int kQueryBytes = Info::Query::kBytes;
  static_assert(Info::Query::kFragmentBytes == Tile::kQueryBytes);
  // Sums at the end, each warp's in the place of its ring; rows are padded so that 8 rows of a store lie in
  // different banks.
  static constexpr int kSumStride = Info::kDv + 8;
  static constexpr int kSumBytes = (kRows * (kSumStride + 2) * 4 + 127) / 128 * 128;
  static constexpr int kWarpBytes = Ring::kBytes > kSumBytes ? Ring::kBytes : kSumBytes;
  static constexpr int kQueryAt = kWarps * kWarpBytes;
  static constexpr int kBarriersAt = kQueryAt + kWarps * kQueryBytes;
  static constexpr int kTablesAt = (kBarriersAt + 8 * kWarps * (kSlots + 1) + 15) / 16 * 16;
  static constexpr int kPagesAt = kTablesAt + Tile::kTableBytes;
  static constexpr int kScratchAt = kPagesAt + kWarps * static_cast<int>(sizeof(PageList));
  static constexpr int kSharedBytes = kScratchAt + kWarps * Info::kScratchBytes;
};

// All warps that take part.
template <class Config>
KVTIDE_DEVICE void SyncWarps() {
  if constexpr (Config::kThreads == Config::kCtaThreads)
    __syncthreads();
  else
    asm volatile("bar.sync 0,%0;" ::"n"(Config::kThreads) : "memory");
}

// A warp writes its state of a unit to a slot.
template <class Config, class Tile>
KVTIDE_DEVICE void WriteState(const AttendParams& params, const Tile& tile, const float* row_values,
                              bool softcap, int rows, size_t slot) {
  constexpr int DV = Config::Info::kDv;
  const int lane = DeviceWarp::Lane(), n = lane >> 2, c = lane & 3;
#pragma unroll
  for (int m = 0; m < Config::Info::kTiles; m++) {
    const int r = n + 8 * m;
    float sum = tile.rows.sum[m];
    sum += DeviceWarp::ShflXor(sum, 1);
    sum += DeviceWarp::ShflXor(sum, 2);
    if (r >= rows) continue;
    float* out = params.outputs + (slot * Config::kRows + r) * DV;
#pragma unroll
    for (int j = 0; j < DV / 8; j++)
      *reinterpret_cast<float2*>(out + 8 * j + 2 * c) =
          make_float2(tile.rows.output[m][j][0] * Tile::kVUnit, tile.rows.output[m][j][1] * Tile::kVUnit);
    if (c == 0)
      params.sums[slot * Config::kRows + r] = {
          tile.rows.reference[m] + (softcap ? 0.0f : row_values[2 * r + 1]), sum};
  }
}

// The end of a CTA: no more copies come, so every warp that ends in the CTA's last unit (`takes_part`) leaves
// its state in the place of its ring, and all threads add the states up in the order of the warps. `slot` is
// warp 0's in that unit.
template <class Config, class Tile>
KVTIDE_DEVICE void SumWarps(const AttendParams& params, const Tile& tile, const float* row_values,
                            bool softcap, uint8_t* shared, bool takes_part, int rows, size_t slot) {
  constexpr int kWarps = Config::kWarps, MT = Config::Info::kTiles, DV = Config::Info::kDv,
                kStride = Config::kSumStride;
  const int warp = static_cast<int>(threadIdx.x) >> 5, lane = DeviceWarp::Lane(), n = lane >> 2, c = lane & 3;
  const auto sums_of = [&](int w) { return reinterpret_cast<float*>(shared + w * Config::kWarpBytes); };
  float* const mine = sums_of(warp);
#pragma unroll
  for (int m = 0; m < MT; m++) {
    float2* const head = reinterpret_cast<float2*>(mine + Config::kRows * kStride) + n + 8 * m;
    float sum = tile.rows.sum[m];
    sum += DeviceWarp::ShflXor(sum, 1);
    sum += DeviceWarp::ShflXor(sum, 2);
    if (!takes_part || n + 8 * m >= rows) {
      if (c == 0) *head = make_float2(kMasked, -1);
      continue;
    }
    if (c == 0)
      *head = make_float2(tile.rows.reference[m] + (softcap ? 0.0f : row_values[2 * (n + 8 * m) + 1]), sum);
    float* row = mine + (n + 8 * m) * kStride;
#pragma unroll
    for (int j = 0; j < DV / 8; j++)
      *reinterpret_cast<float2*>(row + 8 * j + 2 * c) =
          make_float2(tile.rows.output[m][j][0], tile.rows.output[m][j][1]);
  }
  SyncWarps<Config>();
  for (int i = static_cast<int>(threadIdx.x); i < Config::kRows * (DV / 4); i += Config::kThreads) {
    const int r = i / (DV / 4), dim = i % (DV / 4) * 4;
    float2 heads[kWarps];
    float reference = kMasked, sum = 0;
    int first = kWarps;
#pragma unroll
    for (int w = kWarps - 1; w >= 0; w--) {
      heads[w] = *reinterpret_cast<const float2*>(sums_of(w) + Config::kRows * kStride + 2 * r);
      reference = fmaxf(reference, heads[w].x);
      if (heads[w].y >= 0) first = w;
    }
    if (first == kWarps) continue;  // a row that the unit does not have
    float4 out = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      if (heads[w].y < 0) continue;
      const float4 v = *reinterpret_cast<const float4*>(sums_of(w) + r * kStride + dim);
      const float weight = DeviceWarp::Ex2(heads[w].x - reference);
      sum += heads[w].y * weight;
      out.x += v.x * weight;
      out.y += v.y * weight;
      out.z += v.z * weight;
      out.w += v.w * weight;
    }
    out.x *= Tile::kVUnit;
    out.y *= Tile::kVUnit;
    out.z *= Tile::kVUnit;
    out.w *= Tile::kVUnit;
    const size_t row = (slot + static_cast<size_t>(first)) * Config::kRows + r;
    *reinterpret_cast<float4*>(params.outputs + row * DV + dim) = out;
    if (dim == 0) params.sums[row] = {reference, sum};
  }
}

// A warp's query area: what the query kernel wrote for the unit at hand, fetched as the warp comes to it.
template <class Config>
class QueryArea {
 public:
  using Query = typename Config::Info::Query;
  KVTIDE_DEVICE QueryArea(uint8_t* shared, int warp)
      : here_(shared + Config::kQueryAt + warp * Config::kQueryBytes),
        address_(SharedAddress(here_)),
        barrier_(SharedAddress(shared) + Config::kBarriersAt +
                 8 * static_cast<uint32_t>(Config::kWarps * Config::kSlots + warp)) {}
  // By one lane, before all others use the area.
  KVTIDE_DEVICE void Start() { Barrier::Init(barrier_, kCopyArrivals); }
  KVTIDE_DEVICE void Fetch(const AttendParams& params, uint32_t unit) {
    if (IsCopyingLane())
      CopyBytes(address_, params.queries + static_cast<size_t>(unit) * Config::kQueryBytes,
                Config::kQueryBytes, barrier_);
  }
  KVTIDE_DEVICE void Wait() {
    Barrier::Wait(barrier_, parity_);
    parity_ ^= 1;
  }
  KVTIDE_DEVICE uint32_t address() const { return address_; }
  KVTIDE_DEVICE const UnitRange& unit() const {
    return *reinterpret_cast<const UnitRange*>(here_ + Query::kUnitAt);
  }
  // Of each row: what its products are multiplied by, and a bias.
  KVTIDE_DEVICE const float* row_values() const {
    return reinterpret_cast<const float*>(here_ + Query::kFragmentBytes);
  }
  template <class OwnUnit>
  KVTIDE_DEVICE const OwnUnit& own_unit() const {
    return *reinterpret_cast<const OwnUnit*>(here_ + Query::kOwnUnitAt);
  }

 private:
  uint8_t* const here_;
  const uint32_t address_, barrier_;
  uint32_t parity_ = 0;
};

// Tokens of a unit's run that one of its rows sees; from shared memory, since few pages ask.
KVTIDE_DEVICE void VisibleTokens(const UnitRange& unit, int row, int& begin, int& end) {
  const int query = (unit.first_row + min(row, unit.rows - 1)) / unit.rows_per_query;
  begin = max(unit.window_begin + query, 0);
  end = min(unit.causal_end + query, unit.tokens);
}

// Pages of which every row sees every token; none with soft-cap.
struct PlainPages {
  uint32_t first, count = 0;
  KVTIDE_DEVICE PlainPages(const UnitRange& unit, bool softcap) {
    int begin, end, unused;
    VisibleTokens(unit, 0, unused, end);
    VisibleTokens(unit, unit.rows - 1, begin, unused);
    const int page = (begin + kBlockTokens - 1) / kBlockTokens;
    first = unit.first_page + static_cast<uint32_t>(page);
    if (!softcap && end / kBlockTokens > page) count = static_cast<uint32_t>(end / kBlockTokens - page);
  }
  KVTIDE_DEVICE bool Has(uint32_t page) const { return page - first < count; }
};

// Soft-cap and masks of a tile's logits.
template <class Tile, int MT>
KVTIDE_DEVICE void AdjustLogits(const AttendParams& params, const UnitRange& unit, const float* row_values,
                                bool softcap, int first_token, float (&logits)[MT][Tile::kLogits],
                                float (&factor)[MT]) {
  const int lane = DeviceWarp::Lane(), n = lane >> 2, c = lane & 3;
  if (softcap) {
    const float inverse = 1.0f / params.softcap;
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const float bias = row_values[2 * (n + 8 * m) + 1];
#pragma unroll
      for (int l = 0; l < Tile::kLogits; l++)
        logits[m][l] = params.softcap * tanhf(fmaf(logits[m][l], factor[m], bias) * inverse);
      factor[m] = 1;
    }
  }
#pragma unroll
  for (int m = 0; m < MT; m++) {
    int row_begin, row_end;
    VisibleTokens(unit, n + 8 * m, row_begin, row_end);
#pragma unroll
    for (int l = 0; l < Tile::kLogits; l++) {
      const int token = first_token + Tile::TokenOf(l, c);
      if (token < row_begin || token >= row_end) logits[m][l] = kMasked;
    }
  }
}

// Rows of f16 values that were never written may hold anything, infinities too: weight 0 does not silence
// those. valid: how many of the tile's tokens were written.
template <class Tile, int DV>
KVTIDE_DEVICE void SilenceUnwritten(uint32_t values, int valid) {
  if (valid >= Tile::kTokens) return;
  const int from = max(valid, 0) * DV * 2;
  for (int at = from + 16 * DeviceWarp::Lane(); at < Tile::kVBytes; at += 512) {
    DeviceWarp::Store64(values + at, 0, 0);
    DeviceWarp::Store64(values + at + 8, 0, 0);
  }
  LetCopiesOverwrite();
}

// One page of a unit: its keys and values as they come in the ring.
template <class Config, class Tile, class Ring, int MT>
KVTIDE_DEVICE void AttendPage(const AttendParams& params, const UnitRange& unit, const float* row_values,
                              bool softcap, int page_of_unit, bool special, float (&multiplier)[MT],
                              Ring& ring, Tile& tile) {
#pragma unroll 1
  for (int t = 0; t < Tile::kTilesPerPage; t++) {
    float y[MT][Tile::kLogits];
    const uint32_t keys = ring.Wait();
    if constexpr (Config::Info::kRebuilt) tile.BeginPage(page_of_unit);
    tile.KeyStage(keys, t, y);
    if constexpr (!Ring::kWholePages) ring.template Release<false>();
    const int first_token = page_of_unit * kBlockTokens + t * Tile::kTokens;
    const auto adjust = [&](float(&logits)[MT][Tile::kLogits], float(&factor)[MT]) {
      AdjustLogits<Tile, MT>(params, unit, row_values, softcap, first_token, logits, factor);
    };
    const uint32_t values = Ring::kWholePages ? keys + Tile::kKBytes : ring.Wait();
    if constexpr (!Config::Info::kCoded)
      SilenceUnwritten<Tile, Config::Info::kDv>(values, unit.tokens - first_token);
    tile.ValueStage(values, t, y, multiplier, special, adjust);
    ring.template Release<true>();
  }
}

// What one warp of CTA `cta` of the launch does with its share.
template <class Config, class Tile>
KVTIDE_DEVICE void AttendBody(const AttendParams& params, const AttendWorker& worker, uint32_t cta) {
  using Info = typename Config::Info;
  constexpr int kWarps = Config::kWarps, MT = Info::kTiles;
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = static_cast<int>(threadIdx.x) >> 5, lane = DeviceWarp::Lane(), n = lane >> 2;
  const uint32_t base = SharedAddress(shared);
  const uint32_t share_end = worker.end, last_unit = worker.last_unit;
  const size_t first_slot = cta * static_cast<size_t>(kWarps);  // of a unit, that of the CTA's first warp
  uint32_t page = worker.begin, unit_index = worker.unit;

  QueryArea<Config> area(shared, warp);
  if (lane == 0) area.Start();
  typename Config::Ring ring;
  ring.Start(reinterpret_cast<PageList*>(shared + Config::kPagesAt) + warp,
             base + static_cast<uint32_t>(warp) * Config::kWarpBytes,
             base + Config::kBarriersAt + 8 * static_cast<uint32_t>(warp) * Config::kSlots, params.units,
             worker, params.layer_lines);
  if (threadIdx.x == 0) Tile::WriteTables(base + Config::kTablesAt);
  if constexpr (Info::kRebuilt)
    Tile::WriteLookup(base + Config::kTablesAt, static_cast<int>(threadIdx.x), Config::kThreads);
  WaitForEarlierKernels();
  if (page < share_end) area.Fetch(params, unit_index);
  ring.Fill();
  SyncWarps<Config>();

  Tile tile;
  tile.Init(base + Config::kTablesAt);
  if constexpr (Info::kRebuilt)
    tile.InitKeys(base + Config::kTablesAt,
                  base + Config::kScratchAt + static_cast<uint32_t>(warp) * Info::kScratchBytes);
  tile.rows.Reset();
  const bool softcap = params.softcap > 0;
  const float* row_values = nullptr;
  int unit_rows = 0;
  while (page < share_end) {
    area.Wait();
    const UnitRange& unit = area.unit();
    row_values = area.row_values();
    unit_rows = unit.rows;
    float multiplier[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) multiplier[m] = row_values[2 * (n + 8 * m)];
    const PlainPages plain(unit, softcap);
    tile.LoadQuery(area.address());
    if constexpr (Info::kRebuilt) tile.BeginUnit(area.template own_unit<typename Info::Query::OwnUnit>());
    const uint32_t unit_end = min(unit.first_page + unit.pages, share_end);
    for (; page < unit_end; page++)
      AttendPage<Config>(params, unit, row_values, softcap, static_cast<int>(page - unit.first_page),
                         !plain.Has(page), multiplier, ring, tile);
    if (page < share_end || unit_index != last_unit)
      WriteState<Config>(params, tile, row_values, softcap, unit_rows, unit_index + first_slot + warp);
    if (page >= share_end) break;
    unit_index++;
    __syncwarp();  // all lanes are done with the query area
    area.Fetch(params, unit_index);
    tile.rows.Reset();
  }
  SumWarps<Config>(params, tile, row_values, softcap, shared,
                   row_values != nullptr && unit_index == last_unit, unit_rows, last_unit + first_slot);
}

template <class Config, class Tile>
__global__ void __launch_bounds__(Config::kThreads, 1)
    AttendKernelFunction(const __grid_constant__ AttendParams params) {
  if (Config::kSharedBytes > SharedLimitOf(kThisCapability)) return;  // there is another one for this GPU
  LetNextKernelStart();
  const AttendWorker worker =
      params.workers[blockIdx.x * Config::kWarps + (static_cast<int>(threadIdx.x) >> 5)];
  AttendBody<Config, Tile>(params, worker, blockIdx.x);
}

}  // namespace kvtide::cuda
