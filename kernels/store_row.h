// Decoded rows on their way into a caller's tensor.
#pragma once

#include <algorithm>
#include <cstddef>

#include "kernels/base/data_type.h"
#include "kernels/base/finite.h"

namespace kvtide {

// Values first, first + 1, ... of `target` from a row in f32, rounded to nearest; f16 holds at most +-65504.
// Does nothing without a target.
inline void StoreRow(const float* row, size_t count, MutableTensorView target, size_t first) {
  if (target.data == nullptr) return;
  const float largest = target.type == DataType::kF16 ? kMaxF16 : kMaxF32;
  for (size_t i = 0; i < count; i++) target.Set(first + i, std::clamp(row[i], -largest, largest));
}

}  // namespace kvtide
