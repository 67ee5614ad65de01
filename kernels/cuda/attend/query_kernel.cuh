// Prepares the queries of all units of a launch before the attention kernel reads them: one CTA for each
// unit, as many warps as the widest unit has rows. A *query area* is what a worker of the attention kernel
// copies when it comes to a unit: the fragments of the rows, scale and bias of each row, and the range of the
// unit.
#pragma once

#include "kernels/cuda/attend/query_row.h"
#include "kernels/cuda/attend/warp_row.cuh"
#include "kernels/cuda/device/pipeline.cuh"

namespace kvtide::cuda {

// Instead of the size of a K scale's group.
inline constexpr int kF16Query = 0, kBf16Query = -1;

template <int D, int kRowsT, int kGroupT, int kOffsetT = 0, bool kInterleavedT = false>
struct QueryKind {
  static constexpr int kDim = D, kRows = kRowsT, kGroup = kGroupT, kOffset = kOffsetT;
  static constexpr bool kInterleaved = kInterleavedT;
  static constexpr bool kCoded = kGroup > 0;
  static constexpr int kRowFragmentBytes = kRows / 8 * (D / (kCoded ? 32 : 16)) * 512;
  // Coded: followed by the start values of the products of each row and group.
  static constexpr int kFragmentBytes =
      kRowFragmentBytes +
      (kCoded ? kRows * ((D + (kCoded ? kGroup : 1) - 1) / (kCoded ? kGroup : 1)) * 8 : 0);
  static constexpr int kUnitAt = kFragmentBytes + kRows * 8;
  static constexpr int kBytes = kUnitAt + static_cast<int>(sizeof(UnitRange));
  static_assert(kUnitAt % 16 == 0);
};

// A kind that writes rows by itself, and what tiles want to know of a unit beside its range, at kOwnUnitAt.
template <class Kind>
concept WritesRows = requires {
  typename Kind::OwnUnit;
};

// Writes the query area of unit `index`, by way of the CTA's `shared` memory of Kind::kBytes.
template <class Kind>
KVTIDE_DEVICE void QueryBody(const AttendParams& params, uint32_t index_of_unit, uint8_t* shared) {
  constexpr int D = Kind::kDim;
  const AttendUnit& unit = params.units[index_of_unit];
  const int r = static_cast<int>(threadIdx.x >> 5), lane = DeviceWarp::Lane();
  const bool active = r < unit.rows;
  const uint32_t area = SharedAddress(shared);
  WarpRow<D> row;
  if (active) {
    const int index = unit.first_row + r, query = index / unit.rows_per_query,
              head = index - query * unit.rows_per_query;
    LoadRow<D>(params.query, params.query_type,
               unit.first_query + query * unit.query_stride + static_cast<int64_t>(head) * params.head_dim,
               params.head_dim, row);
  }
  // Rows that the unit does not have are zeros.
  for (int i = static_cast<int>(threadIdx.x); i < Kind::kUnitAt / 16; i += static_cast<int>(blockDim.x))
    reinterpret_cast<uint4*>(shared)[i] = uint4{};
  if (threadIdx.x == 0) {
    *reinterpret_cast<UnitRange*>(shared + Kind::kUnitAt) = unit;
    if constexpr (WritesRows<Kind>)
      *reinterpret_cast<typename Kind::OwnUnit*>(shared + Kind::kOwnUnitAt) = Kind::UnitOf(params, unit);
  }
  __syncthreads();
  if (active) {
    float bias = 0, unit_value;
    if constexpr (WritesRows<Kind>) {
      unit_value = Kind::WriteRow(params, unit, row, r, area);
    } else if constexpr (Kind::kCoded) {
      WarpRow<D> other;
      if (unit.mean != nullptr) {
        LoadRow<D>(unit.mean, QueryType::kF32, params.profile_offset, params.head_dim, other);
#pragma unroll
        for (int b = 0; b < WarpRow<D>::kBlocks; b++)
#pragma unroll
          for (int i = 0; i < 4; i++) bias += row.x[b][i] * other.x[b][i];
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) bias += DeviceWarp::ShflXor(bias, mask);
      }
      if (unit.gain != nullptr) {
        LoadRow<D>(unit.gain, QueryType::kF32, params.profile_offset, params.head_dim, other);
#pragma unroll
        for (int b = 0; b < WarpRow<D>::kBlocks; b++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (128 * b + 4 * lane + i < params.head_dim) row.x[b][i] /= other.x[b][i];
      }
      Rotate<D, false>(params.k_rotation, row);
      unit_value = WriteCodedQuery<DeviceWarp, D, Kind::kGroup, Kind::kOffset, Kind::kInterleaved>(
          row, params.key_scale, r, area, Kind::kRowFragmentBytes);
    } else {
      unit_value = WriteHalfQuery<DeviceWarp, D, Kind::kGroup == kBf16Query>(row, params.key_scale, r, area);
    }
    if (lane == 0)
      DeviceWarp::Store64(area + Kind::kFragmentBytes + r * 8, __float_as_uint(unit_value),
                          __float_as_uint(bias * params.scale));
  }
  __syncthreads();
  WaitForEarlierKernels();
  uint4* const to =
      reinterpret_cast<uint4*>(params.queries + static_cast<size_t>(index_of_unit) * Kind::kBytes);
  for (int i = static_cast<int>(threadIdx.x); i < Kind::kBytes / 16; i += static_cast<int>(blockDim.x))
    to[i] = reinterpret_cast<const uint4*>(shared)[i];
}

template <class Kind>
__global__ void __launch_bounds__(32 * Kind::kRows, 1024 / (32 * Kind::kRows))
    QueryKernel(const __grid_constant__ AttendParams params) {
  __shared__ __align__(128) uint8_t shared[Kind::kBytes];
  LetNextKernelStart();
  QueryBody<Kind>(params, blockIdx.x, shared);
}

}  // namespace kvtide::cuda
