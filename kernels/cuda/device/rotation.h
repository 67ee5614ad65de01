// The rotation of a head vector as the kernels see it.
#pragma once

#include <cstdint>

namespace kvtide::cuda {

// kMatrix: an n x n matrix for each run of 128 dims, stored by columns with a stride of 128, for rotations
// without code here.
enum class RotationKind : int32_t { kNone, kHadamard, kMatrix };
struct Rotation {
  RotationKind kind = RotationKind::kNone;
  int32_t padding = 0;
  const float* matrix = nullptr;
  bool operator==(const Rotation&) const = default;
};

}  // namespace kvtide::cuda
