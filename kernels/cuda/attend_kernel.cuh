// The decode attention kernel: persistent CTAs, one per SM, each with an equal contiguous share of the pages of the
// launch. Inside a CTA the warps take pages in turn, each behind a ring of its own that runs on over the borders of units.
//
// At the end of a unit the warps that had pages of it add up their sums one after the other in shared memory, in the order
// in which they took their first page, and the last one writes the CTA's partial state. Warps never meet at a CTA barrier:
// one that is done goes on with the next unit. Queries of the next unit are prepared while the current one is read.
// Everything is added in a fixed order: the same call gives the same bits.
#pragma once

#include "kernels/cuda/coded_tile.h"
#include "kernels/cuda/half_tile.h"
#include "kernels/cuda/pipeline.cuh"
#include "kernels/cuda/query_row.h"
#include "kernels/cuda/warp_row.cuh"

namespace kvtide::cuda {

// Coded tiles say their K group and table offset; half tiles have neither.
template <class Tile>
struct TileQuery;
template <class W, class KCodec, class VCodec, int DK, int DV, int MT, bool kSplit, bool kRegisters>
struct TileQuery<CodedTile<W, KCodec, VCodec, DK, DV, MT, kSplit, kRegisters>> {
  using Tile = CodedTile<W, KCodec, VCodec, DK, DV, MT, kSplit, kRegisters>;
  static constexpr int kDk = DK, kDv = DV, kTiles = MT;
  static constexpr bool kCoded = true;
  static KVTIDE_DEVICE float Write(const WarpRow<DK>& row, int r, typename W::Shared area) {
    return WriteCodedQuery<W, DK, KCodec::kGroup, Tile::KDecoder::kOffset>(row, r, area, Tile::kQueryFragmentBytes);
  }
};
template <class W, bool kBf16, int DK, int DV, int MT, int kTokens>
struct TileQuery<HalfTile<W, kBf16, DK, DV, MT, kTokens>> {
  static constexpr int kDk = DK, kDv = DV, kTiles = MT;
  static constexpr bool kCoded = false;
  static KVTIDE_DEVICE float Write(const WarpRow<DK>& row, int r, typename W::Shared area) {
    return WriteHalfQuery<W, DK, kBf16>(row, r, area);
  }
};

template <class Tile, int kWarpsT, int kSlotsT>
struct AttendConfig {
  using Info = TileQuery<Tile>;
  using Ring = PieceRing<Tile, kWarpsT, kSlotsT>;
  static constexpr int kWarps = kWarpsT, kSlots = kSlotsT, kThreads = 32 * kWarps;
  static constexpr int kRows = Tile::kRows;
  // A query area: fragments, scale and bias of each row, the unit.
  static constexpr int kQueryBytes = (Tile::kQueryBytes + kRows * 8 + static_cast<int>(sizeof(AttendUnit)) + 127) / 128 * 128;
  // Sums on their way from warp to warp; rows are padded so that the 8 rows of a store lie in different banks.
  static constexpr int kSumStride = Info::kDv + 8;
  static constexpr int kSumBytes = (kRows * (kSumStride + 2) * 4 + 127) / 128 * 128;
  static constexpr bool kRingHoldsSums = Ring::kBytes >= kSumBytes;
  static constexpr int kQueryAt = kWarps * Ring::kBytes;
  static constexpr int kSumsAt = kQueryAt + 2 * kQueryBytes;
  static constexpr int kBarriersAt = kSumsAt + 2 * kSumBytes;
  static constexpr int kBarriers = kWarps * kSlots + 2 * kWarps + 4;
  static constexpr int kTablesAt = (kBarriersAt + 8 * kBarriers + 15) / 16 * 16;
  static constexpr int kPagesAt = kTablesAt + Tile::kTableBytes;
  static constexpr int kUncheckedBytes = kPagesAt + kWarps * static_cast<int>(sizeof(PageList));
  static constexpr int kSharedBytes = kUncheckedBytes;
};

// What a query row is made from, loaded before it is needed: a CTA's first copies of pages would hold later loads up.
template <int D>
struct RowInputs {
  WarpRow<D> query, mean, gain;
};

template <class Config>
KVTIDE_DEVICE void LoadInputs(const AttendParams& params, const AttendUnit& unit, int r, RowInputs<Config::Info::kDk>& in) {
  constexpr int D = Config::Info::kDk;
  if (r >= unit.rows) return;
  const int index = unit.first_row + r, query = index / unit.rows_per_query, head = index - query * unit.rows_per_query;
  LoadRow<D>(unit.query, params.query_type, query * unit.query_stride + static_cast<int64_t>(head) * params.head_dim, params.head_dim,
             in.query);
  if constexpr (Config::Info::kCoded) {
    if (unit.mean != nullptr) LoadRow<D>(unit.mean, QueryType::kF32, 0, params.head_dim, in.mean);
    if (unit.gain != nullptr) LoadRow<D>(unit.gain, QueryType::kF32, 0, params.head_dim, in.gain);
  }
}

// One query row of a unit into its query area.
template <class Config, class Tile>
KVTIDE_DEVICE void WriteRow(const AttendParams& params, const AttendUnit& unit, int r, uint32_t area,
                            RowInputs<Config::Info::kDk>& in) {
  using Info = typename Config::Info;
  constexpr int D = Info::kDk;
  float bias = 0;
  if (r < unit.rows) {
    if constexpr (Info::kCoded) {
      if (unit.mean != nullptr) {
#pragma unroll
        for (int b = 0; b < WarpRow<D>::kBlocks; b++)
#pragma unroll
          for (int i = 0; i < 4; i++) bias += in.query.x[b][i] * in.mean.x[b][i];
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) bias += DeviceWarp::ShflXor(bias, mask);
      }
      if (unit.gain != nullptr) {
#pragma unroll
        for (int b = 0; b < WarpRow<D>::kBlocks; b++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (128 * b + 4 * DeviceWarp::Lane() + i < params.head_dim) in.query.x[b][i] /= in.gain.x[b][i];
      }
      Rotate<D, false>(params.k_rotation, in.query);
    }
  } else {
#pragma unroll
    for (int b = 0; b < WarpRow<D>::kBlocks; b++)
      in.query.x[b][0] = in.query.x[b][1] = in.query.x[b][2] = in.query.x[b][3] = 0;
  }
  const float step = Info::Write(in.query, r, area);
  if (DeviceWarp::Lane() == 0)
    DeviceWarp::Store64(area + Tile::kQueryBytes + r * 8,
                        __float_as_uint(fmaxf(step * params.scale * Tile::kKUnit, 1e-25f)), __float_as_uint(bias * params.scale));
}

// The end of a CTA: no more copies come, so every warp leaves its sums in its own ring, and all threads add them up.
// `position` of a warp = order of first pages of the unit; the first `takers` had pages.
template <class Config, class Tile>
KVTIDE_DEVICE void SumWarps(const AttendParams& params, Tile& tile, const float (&bias)[Config::Info::kTiles], uint8_t* shared, int position,
                            int takers, int rows, size_t slot) {
  constexpr int kWarps = Config::kWarps, MT = Config::Info::kTiles, DV = Config::Info::kDv, kStride = Config::kSumStride;
  const int warp = static_cast<int>(threadIdx.x) >> 5, lane = DeviceWarp::Lane(), n = lane >> 2, c = lane & 3;
  const auto sums_of = [&](int w) { return reinterpret_cast<float*>(shared + w * Config::Ring::kBytes); };
  if (position < takers) {
    float* const mine = sums_of(warp);
#pragma unroll
    for (int m = 0; m < MT; m++) {
      tile.rows.sum[m] += DeviceWarp::ShflXor(tile.rows.sum[m], 1);
      tile.rows.sum[m] += DeviceWarp::ShflXor(tile.rows.sum[m], 2);
      float* row = mine + (n + 8 * m) * kStride;
      if (c == 0)
        *reinterpret_cast<float2*>(mine + Config::kRows * kStride + 2 * (n + 8 * m)) =
            make_float2(tile.rows.reference[m] + bias[m], tile.rows.sum[m]);
#pragma unroll
      for (int j = 0; j < DV / 8; j++)
        *reinterpret_cast<float2*>(row + 8 * j + 2 * c) = make_float2(tile.rows.output[m][j][0], tile.rows.output[m][j][1]);
    }
  }
  __syncthreads();
  const int first = (warp - position % kWarps + kWarps) % kWarps;  // the warp of position 0
  for (int i = static_cast<int>(threadIdx.x); i < rows * (DV / 4); i += Config::kThreads) {
    const int r = i / (DV / 4), dim = i % (DV / 4) * 4;
    float reference = kMasked, sum = 0;
    for (int p = 0; p < takers; p++) {
      const float* head = sums_of((first + p) % kWarps) + Config::kRows * kStride + 2 * r;
      reference = fmaxf(reference, head[0]);
    }
    float4 out = make_float4(0, 0, 0, 0);
    for (int p = 0; p < takers; p++) {
      const float* from = sums_of((first + p) % kWarps);
      const float2 head = *reinterpret_cast<const float2*>(from + Config::kRows * kStride + 2 * r);
      const float4 v = *reinterpret_cast<const float4*>(from + r * kStride + dim);
      const float weight = DeviceWarp::Ex2(head.x - reference);
      sum += head.y * weight;
      out.x += v.x * weight;
      out.y += v.y * weight;
      out.z += v.z * weight;
      out.w += v.w * weight;
    }
    out.x *= Tile::kVUnit;
    out.y *= Tile::kVUnit;
    out.z *= Tile::kVUnit;
    out.w *= Tile::kVUnit;
    *reinterpret_cast<float4*>(params.outputs + (slot * Config::kRows + r) * DV + dim) = out;
    if (dim == 0) params.sums[slot * Config::kRows + r] = make_float2(reference, sum);
  }
}

template <class Config, class Tile>
__global__ void __launch_bounds__(Config::kThreads, 1) AttendKernelFunction(const __grid_constant__ AttendParams params) {
  static_assert(Config::kSharedBytes <= 227 * 1024);
  using Info = typename Config::Info;
  constexpr int kWarps = Config::kWarps, MT = Info::kTiles, DV = Info::kDv;
  extern __shared__ __align__(128) uint8_t shared[];
  asm volatile("griddepcontrol.launch_dependents;");
  const AttendShare& share = params.shares[blockIdx.x];
  const uint32_t share_end = share.end;
  if (share.begin >= share_end) return;
  const int warp = static_cast<int>(threadIdx.x) >> 5, lane = DeviceWarp::Lane(), n = lane >> 2, c = lane & 3;
  const uint32_t base = SharedAddress(shared);
  const uint32_t barriers = base + Config::kBarriersAt;
  const uint32_t chain = barriers + 8 * kWarps * Config::kSlots;  // [2][kWarps]
  const uint32_t query_full = chain + 16 * kWarps, query_empty = query_full + 16;  // [2] each

  RowInputs<Info::kDk> first_inputs;
  LoadInputs<Config>(params, share.first, warp, first_inputs);
  typename Config::Ring ring;
  ring.Init(reinterpret_cast<PageList*>(shared + Config::kPagesAt) + warp, base + static_cast<uint32_t>(warp) * Config::Ring::kBytes, barriers + 8 * static_cast<uint32_t>(warp) * Config::kSlots,
            warp, params, share);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * kWarps; i++) Barrier::Init(chain + 8 * i, 32);
    for (int i = 0; i < 4; i++) Barrier::Init(query_full + 8 * i, 32 * kWarps);
    Barrier::FenceInit();
    Tile::WriteTables(base + Config::kTablesAt);
  }
  __syncthreads();

  Tile tile;
  tile.Init(base + Config::kTablesAt);

  // Brings a unit (local number i) into query area i & 1: rows by different warps, the unit itself by warp 0.
  const auto prepare = [&](const AttendUnit& unit, int i, RowInputs<Info::kDk>* loaded) {
    const uint32_t area = base + Config::kQueryAt + (i & 1) * Config::kQueryBytes;
    if (i >= 2) Barrier::Wait(query_empty + 8 * (i & 1), ((i >> 1) - 1) & 1);
    for (int r = warp; r < Config::kRows; r += kWarps) {
      RowInputs<Info::kDk> in;
      if (loaded != nullptr && r == warp) {
        in = *loaded;
      } else {
        LoadInputs<Config>(params, unit, r, in);
      }
      WriteRow<Config, Tile>(params, unit, r, area, in);
    }
    if (warp == 0 && lane < static_cast<int>(sizeof(AttendUnit) / 16)) {
      const uint4 v = reinterpret_cast<const uint4*>(&unit)[lane];
      const uint32_t to = area + Tile::kQueryBytes + 8 * Config::kRows + 16 * lane;
      DeviceWarp::Store64(to, v.x, v.y);
      DeviceWarp::Store64(to + 8, v.z, v.w);
    }
    Barrier::Arrive(query_full + 8 * (i & 1));
  };

  prepare(params.shares[blockIdx.x].first, 0, &first_inputs);
  uint32_t page = share.begin + static_cast<uint32_t>(warp);
  const uint32_t first_unit = share.unit;
  uint32_t unit_begin = share.begin;  // first page of the unit in this share
  for (int i = 0;; i++) {
    const int area_at = Config::kQueryAt + (i & 1) * Config::kQueryBytes;
    Barrier::Wait(query_full + 8 * (i & 1), (i >> 1) & 1);
    const AttendUnit& unit = *reinterpret_cast<const AttendUnit*>(shared + area_at + Tile::kQueryBytes + 8 * Config::kRows);
    const uint32_t unit_index = first_unit + static_cast<uint32_t>(i);
    const uint32_t unit_end = min(unit.first_page + unit.pages, share_end);
    const bool last_unit = unit_end >= share_end;
    const int unit_rows = unit.rows;  // the area is given back before the sums are written
    const float* row_values = reinterpret_cast<const float*>(shared + area_at + Tile::kQueryBytes);
    float multiplier[MT];
    int all_begin, all_end;  // tokens that every row sees
    const bool softcap = params.softcap > 0;
    // Tokens that a row sees; from shared memory, since few pages ask.
    const auto limits = [&unit](int row, int& begin, int& end) {
      const int query = (unit.first_row + min(row, unit.rows - 1)) / unit.rows_per_query;
      begin = max(unit.window_begin + query, 0);
      end = min(unit.causal_end + query, unit.tokens);
    };
#pragma unroll
    for (int m = 0; m < MT; m++) multiplier[m] = row_values[2 * (n + 8 * m)];
    {
      int unused;
      limits(0, unused, all_end);
      limits(unit.rows - 1, all_begin, unused);
    }
    tile.rows.Reset();
    tile.LoadQuery(base + static_cast<uint32_t>(area_at));

    bool prepared = last_unit;
    const uint32_t my_first = page;
    for (; page < unit_end; page += kWarps) {
      const int page_token = static_cast<int>(page - unit.first_page) * kBlockTokens;
#pragma unroll 1
      for (int t = 0; t < Tile::kTilesPerPage; t++) {
        float y[MT][Tile::kLogits];
        tile.KeyStage(ring.Wait(), t, y);
        ring.template Release<false>();
        const int first_token = page_token + t * Tile::kTokens;
        float factor[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) factor[m] = multiplier[m];
        if (softcap) {
          const float inverse = 1.0f / params.softcap;
#pragma unroll
          for (int m = 0; m < MT; m++) {
            factor[m] = 1;
            const float bias = row_values[2 * (n + 8 * m) + 1];
#pragma unroll
            for (int l = 0; l < Tile::kLogits; l++)
              y[m][l] = params.softcap * tanhf(fmaf(y[m][l], multiplier[m], bias) * inverse);
          }
        }
        if (first_token < all_begin || first_token + Tile::kTokens > all_end) {
#pragma unroll
          for (int m = 0; m < MT; m++) {
            int row_begin, row_end;
            limits(n + 8 * m, row_begin, row_end);
#pragma unroll
            for (int l = 0; l < Tile::kLogits; l++) {
              const int token = first_token + Tile::TokenOf(l, c);
              if (token < row_begin || token >= row_end) y[m][l] = kMasked;
            }
          }
        }
        const uint32_t values = ring.Wait();
        if constexpr (!Info::kCoded) {
          // Rows that were never written may hold anything, infinities too: weight 0 does not silence those.
          const int valid = unit.tokens - first_token;
          if (valid < Tile::kTokens) {
            const int from = max(valid, 0) * DV * 2;
            for (int at = from + 16 * lane; at < Tile::kVBytes; at += 512) {
              DeviceWarp::Store64(values + at, 0, 0);
              DeviceWarp::Store64(values + at + 8, 0, 0);
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
          }
        }
        tile.ValueStage(values, t, y, factor);
        ring.template Release<true>();
      }
      if (!prepared) {
        prepare(params.units[unit_index + 1], i + 1, nullptr);
        prepared = true;
      }
    }
    if (!prepared) prepare(params.units[unit_index + 1], i + 1, nullptr);
    float bias[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) bias[m] = softcap ? 0.0f : row_values[2 * (n + 8 * m) + 1];
    Barrier::Arrive(query_empty + 8 * (i & 1));

    if (Config::kRingHoldsSums && last_unit) {
      SumWarps<Config, Tile>(params, tile, bias, shared, static_cast<int>(my_first - unit_begin),
                             min(static_cast<int>(unit_end - unit_begin), kWarps), unit_rows, unit_index + blockIdx.x);
      break;
    }

    // The sums of this CTA: position of a warp = order of first pages; those without pages take no part.
    const int position = static_cast<int>(my_first - unit_begin);
    const int takers = min(static_cast<int>(unit_end - unit_begin), kWarps);
    if (my_first < unit_end) {
      const uint32_t my_chain = chain + 8 * kWarps * (i & 1);
      float* const sums = reinterpret_cast<float*>(shared + Config::kSumsAt + (i & 1) * Config::kSumBytes);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        tile.rows.sum[m] += DeviceWarp::ShflXor(tile.rows.sum[m], 1);
        tile.rows.sum[m] += DeviceWarp::ShflXor(tile.rows.sum[m], 2);
      }
      if (position > 0) {
        Barrier::Wait(my_chain + 8 * position, (i >> 1) & 1);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          const float* row = sums + (n + 8 * m) * Config::kSumStride;
          const float* head = sums + Config::kRows * Config::kSumStride + 2 * (n + 8 * m);
          const float reference = fmaxf(tile.rows.reference[m], head[0]);
          const float mine = DeviceWarp::Ex2(tile.rows.reference[m] - reference);
          const float others = DeviceWarp::Ex2(head[0] - reference);
          tile.rows.reference[m] = reference;
          tile.rows.sum[m] = tile.rows.sum[m] * mine + head[1] * others;
#pragma unroll
          for (int j = 0; j < DV / 8; j++) {
            const float2 v = *reinterpret_cast<const float2*>(row + 8 * j + 2 * c);
            tile.rows.output[m][j][0] = tile.rows.output[m][j][0] * mine + v.x * others;
            tile.rows.output[m][j][1] = tile.rows.output[m][j][1] * mine + v.y * others;
          }
        }
      } else if (i >= 2) {
        Barrier::Wait(my_chain, ((i >> 1) - 1) & 1);
      }
      if (position + 1 < takers) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
          float* row = sums + (n + 8 * m) * Config::kSumStride;
          float* head = sums + Config::kRows * Config::kSumStride + 2 * (n + 8 * m);
          __syncwarp();  // all lanes of the row have read its head
          if (c == 0) *reinterpret_cast<float2*>(head) = make_float2(tile.rows.reference[m], tile.rows.sum[m]);
#pragma unroll
          for (int j = 0; j < DV / 8; j++)
            *reinterpret_cast<float2*>(row + 8 * j + 2 * c) = make_float2(tile.rows.output[m][j][0], tile.rows.output[m][j][1]);
        }
        Barrier::Arrive(my_chain + 8 * (position + 1));
      } else {
        for (int w = takers; w < kWarps; w++) Barrier::Arrive(my_chain + 8 * w);
        Barrier::Arrive(my_chain);
        const size_t slot = unit_index + blockIdx.x;
#pragma unroll
        for (int m = 0; m < MT; m++) {
          const int r = n + 8 * m;
          if (r >= unit_rows) continue;
          float* out = params.outputs + (slot * Config::kRows + r) * DV;
#pragma unroll
          for (int j = 0; j < DV / 8; j++)
            *reinterpret_cast<float2*>(out + 8 * j + 2 * c) =
                make_float2(tile.rows.output[m][j][0] * Tile::kVUnit, tile.rows.output[m][j][1] * Tile::kVUnit);
          if (c == 0)
            params.sums[slot * Config::kRows + r] =
                make_float2(tile.rows.reference[m] + bias[m], tile.rows.sum[m]);
        }
      }
    }
    if (last_unit) break;
    unit_begin = unit_end;
  }
}

}  // namespace kvtide::cuda
