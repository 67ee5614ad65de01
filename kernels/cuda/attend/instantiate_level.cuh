// Entries of the list of kernels for calibrated keys that are coded after RoPE, and the kernel that turns
// their queries.
#pragma once

#include "kernels/cuda/attend/instantiate.cuh"
#include "kernels/cuda/attend/level_kernels.h"
#include "kernels/cuda/attend/level_tile.h"

namespace kvtide::cuda {

// The query area of a unit.
template <int D, int kRowsT>
struct LevelQueryKind {
  static constexpr int kDim = D, kRows = kRowsT;
  static constexpr int kFragmentBytes = kRows / 8 * LevelTables<D>::kQueryBytes;
  static constexpr int kUnitAt = kFragmentBytes + kRows * 8;
  using OwnUnit = LevelUnit<D>;
  static constexpr int kOwnUnitAt = kUnitAt + static_cast<int>(sizeof(UnitRange));
  static constexpr int kBytes = kOwnUnitAt + static_cast<int>(sizeof(OwnUnit));
  static_assert(kUnitAt % 16 == 0 && kBytes % 16 == 0);
};

// QueryKernel for such areas: a CTA for each unit. Any number of warps does that has one for each row; with
// kRows of them each turns its columns once. Units without pages, which plans made on the device have behind
// the others (device_plan.cuh), name no tables and get no area: no worker comes to them.
template <class Kind>
__global__ void __launch_bounds__(32 * Kind::kRows, 512 / (32 * Kind::kRows))
    LevelQueryKernel(const __grid_constant__ AttendParams params) {
  constexpr int D = Kind::kDim;
  constexpr int kFloats = Kind::kRows * D * 4;  // of all rows
  __shared__ __align__(128) uint8_t shared[Kind::kBytes];
  __shared__ __align__(16) uint8_t before[kFloats], after[kFloats];
  LetNextKernelStart();
  const AttendUnit& unit = params.units[blockIdx.x];
  if (unit.pages == 0) {
    WaitForEarlierKernels();  // the attention kernel is behind all of those
    return;
  }
  const std::byte* const tables = unit.tables + params.table_offset;
  const int r = static_cast<int>(threadIdx.x >> 5), warps = static_cast<int>(blockDim.x >> 5);
  const bool active = r < unit.rows;
  const uint32_t area = SharedAddress(shared), rows = SharedAddress(before), turned = SharedAddress(after);
  WarpRow<D> row = {};
  if (active) {
    const int index = unit.first_row + r, query = index / unit.rows_per_query,
              head = index - query * unit.rows_per_query;
    LoadRow<D>(params.query, params.query_type,
               unit.first_query + query * unit.query_stride + static_cast<int64_t>(head) * params.head_dim,
               params.head_dim, row);
  }
  // Rows that the unit does not have are zeros.
  StoreLevelRow<DeviceWarp, D>(row, r, rows);
  for (int other = r + warps; other < Kind::kRows; other += warps)
    StoreLevelRow<DeviceWarp, D>(WarpRow<D>{}, other, rows);
  for (int i = static_cast<int>(threadIdx.x); i < Kind::kUnitAt / 16; i += static_cast<int>(blockDim.x))
    reinterpret_cast<uint4*>(shared)[i] = uint4{};
  if (threadIdx.x == 0) *reinterpret_cast<UnitRange*>(shared + Kind::kUnitAt) = unit;
  if (threadIdx.x < sizeof(typename Kind::OwnUnit) / 16)
    reinterpret_cast<uint4*>(shared + Kind::kOwnUnitAt)[threadIdx.x] =
        reinterpret_cast<const uint4*>(tables + LevelTables<D>::kUnit)[threadIdx.x];
  __syncthreads();
#pragma unroll 1
  for (int part = r; part < Kind::kRows; part += warps)
    TurnLevelRows<DeviceWarp, D, Kind::kRows>(rows, tables, part, turned);
  __syncthreads();
  if (active) {
    float bias = 0;
    const float unit_value =
        WriteLevelQuery<DeviceWarp, D>(row, params.key_scale, r, tables, turned, area, bias);
    if (DeviceWarp::Lane() == 0)
      DeviceWarp::Store64(area + Kind::kFragmentBytes + r * 8, __float_as_uint(unit_value),
                          __float_as_uint(bias * params.scale));
  }
  __syncthreads();
  WaitForEarlierKernels();
  uint4* const to = reinterpret_cast<uint4*>(params.queries + static_cast<size_t>(blockIdx.x) * Kind::kBytes);
  for (int i = static_cast<int>(threadIdx.x); i < Kind::kBytes / 16; i += static_cast<int>(blockDim.x))
    to[i] = reinterpret_cast<const uint4*>(shared)[i];
}

// To the attention kernel the tile is one of those that rebuild keys: it has a lookup, memory of its warps'
// own and something to know of a unit.
template <class W, int kKeyBits, class VCodec, int DK, int DV, int MT>
struct TileInfo<LevelTile<W, kKeyBits, VCodec, DK, DV, MT>> {
  using Tile = LevelTile<W, kKeyBits, VCodec, DK, DV, MT>;
  static constexpr int kDk = DK, kDv = DV, kTiles = MT;
  static constexpr bool kCoded = true, kRebuilt = true;
  static constexpr int kScratchBytes = Tile::kScratchBytes;
  static constexpr int kWarps = WarpsByRegisters(DK, DV, MT, false);
  using Query = LevelQueryKind<DK, Tile::kRows>;
};

template <Form kForm, int kKeyBits, class V, int D, int MT>
void AddLevelTile(std::vector<AttendKernel>* list) {
  using VS = typename V::Stored;
  using Tile = LevelTile<DeviceWarp, kKeyBits, VS, D, D, MT>;
  using Info = TileInfo<Tile>;
  ForEachSharedLimit([list](auto limit) {
    constexpr int kLimit = decltype(limit)::value;
    using Config = typename ConfigFor<Tile, Info::kWarps, true, kLimit>::Type;
    list->push_back({kForm,
                     FormOfCodec<VS>(),
                     D,
                     D,
                     Config::kRows,
                     Config::kThreads,
                     Config::kSharedBytes,
                     reinterpret_cast<const void*>(&AttendKernelFunction<Config, Tile>),
                     reinterpret_cast<const void*>(&LevelQueryKernel<typename Info::Query>),
                     32 * Config::kRows,
                     Config::kQueryBytes,
                     Tile::kKUnit,
                     kLimit,
                     {}});
  });
}

// Calibrated keys with turbo values of the same bits, tide1 with turbo2.
template <int D>
void AddLevelPairs(std::vector<AttendKernel>* list) {
  AddLevelTile<Form::kTide4, 4, Turbo4, D, 1>(list);
  AddLevelTile<Form::kTide4, 4, Turbo4, D, 2>(list);
  AddLevelTile<Form::kTide3, 3, Turbo3, D, 1>(list);
  AddLevelTile<Form::kTide3, 3, Turbo3, D, 2>(list);
  AddLevelTile<Form::kTide2, 2, Turbo2, D, 1>(list);
  AddLevelTile<Form::kTide2, 2, Turbo2, D, 2>(list);
  AddLevelTile<Form::kTide1, 1, Turbo2, D, 1>(list);
  AddLevelTile<Form::kTide1, 1, Turbo2, D, 2>(list);
}

}  // namespace kvtide::cuda
