// Finds the first value of a tensor that is NaN, infinite or larger than a limit, at the speed of memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/base/data_type.h"

namespace kvtide {

// The largest finite values.
constexpr float kMaxF16 = 65504.0f, kMaxF32 = 3.40282346638528859812e38f;

namespace internal {

// Magnitudes of a type are in the order of their bit patterns, so the largest pattern of a stretch decides;
// the loop vectorises.
template <class T>
size_t FirstBeyond(const T* bits, size_t count, T mask, T limit) {
  constexpr size_t kStretch = 4096;
  for (size_t begin = 0; begin < count; begin += kStretch) {
    const size_t end = std::min(begin + kStretch, count);
    T largest = 0;
    for (size_t i = begin; i < end; i++) largest = std::max(largest, static_cast<T>(bits[i] & mask));
    if (largest <= limit) continue;
    for (size_t i = begin; i < end; i++)
      if (static_cast<T>(bits[i] & mask) > limit) return i;
  }
  return count;
}

}  // namespace internal

// Index of the first of `count` values whose magnitude is above `largest` or that is no number; `count` if
// there is none. `largest` is positive and finite.
inline size_t FirstBeyond(TensorView tensor, size_t count, float largest) {
  if (tensor.type == DataType::kF32)
    return internal::FirstBeyond<uint32_t>(static_cast<const uint32_t*>(tensor.data), count, 0x7fffffffu,
                                           FloatBits(largest));
  const auto* bits = static_cast<const uint16_t*>(tensor.data);
  // The pattern of the largest value of the type that is not above `largest`.
  uint16_t limit = tensor.type == DataType::kF16 ? F32ToF16(std::min(largest, kMaxF16))
                                                 : static_cast<uint16_t>(FloatBits(largest) >> 16);
  if (tensor.type == DataType::kF16 && F16ToF32(limit) > largest) limit--;
  return internal::FirstBeyond<uint16_t>(bits, count, 0x7fffu, limit);
}

}  // namespace kvtide
