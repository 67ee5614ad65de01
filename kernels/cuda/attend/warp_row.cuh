// A head vector spread over a warp (query_row.h): loads from tensors of any element type, and rotations by
// kind.
#pragma once

#include "kernels/cuda/attend/attend_plan.h"
#include "kernels/cuda/attend/query_row.h"

namespace kvtide::cuda {

template <int D>
KVTIDE_DEVICE void LoadRow(const void* base, QueryType type, int64_t offset, int head_dim, WarpRow<D>& row) {
  const int lane = DeviceWarp::Lane();
#pragma unroll
  for (int b = 0; b < WarpRow<D>::kBlocks; b++) {
    float(&x)[4] = row.x[b];
    const int dim = 128 * b + 4 * lane;
    x[0] = x[1] = x[2] = x[3] = 0;
    if (dim >= head_dim) continue;
    if (type == QueryType::kF32) {
      const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(base) + offset + dim);
      x[0] = v.x;
      x[1] = v.y;
      x[2] = v.z;
      x[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(base) + offset + dim);
      if (type == QueryType::kF16) {
        DeviceWarp::Unpack<false>(v.x, x[0], x[1]);
        DeviceWarp::Unpack<false>(v.y, x[2], x[3]);
      } else {
        DeviceWarp::Unpack<true>(v.x, x[0], x[1]);
        DeviceWarp::Unpack<true>(v.y, x[2], x[3]);
      }
    }
  }
}

// y_i = sum of matrix[i][j] x_j in each run of 128 dims.
template <int D>
KVTIDE_DEVICE void RotateByMatrix(const float* matrix, WarpRow<D>& row) {
  const int lane = DeviceWarp::Lane();
#pragma unroll
  for (int b = 0; b < WarpRow<D>::kBlocks; b++) {
    const int n = 128 * (b + 1) <= D ? 128 : D % 128;
    const float* columns = matrix + b * 128 * 128 + 4 * lane;
    float y[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int j = 0; j < n / 4; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float x = __shfl_sync(0xffffffffu, row.x[b][e], j);
        const float4 m = *reinterpret_cast<const float4*>(columns + (4 * j + e) * 128);
        y[0] += m.x * x;
        y[1] += m.y * x;
        y[2] += m.z * x;
        y[3] += m.w * x;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) row.x[b][i] = y[i];
  }
}

template <int D, bool kInverse>
KVTIDE_DEVICE void Rotate(const Rotation& rotation, WarpRow<D>& row) {
  if (rotation.kind == RotationKind::kHadamard) RotateHadamard<DeviceWarp, D, kInverse>(row);
  if (rotation.kind == RotationKind::kMatrix) RotateByMatrix<D>(rotation.matrix, row);
}

}  // namespace kvtide::cuda
