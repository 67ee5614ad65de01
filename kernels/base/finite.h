// Finds the first value of a tensor that is NaN, infinite or larger than a limit, at the speed of memory.
#pragma once

#include <cstddef>

#include "kernels/base/data_type.h"

namespace kvtide {

// The largest finite values.
constexpr float kMaxF16 = 65504.0f, kMaxF32 = 3.40282346638528859812e38f;

// Index of the first of `count` values whose magnitude is above `largest` or that is no number; `count` if
// there is none. `largest` is positive and finite.
size_t FirstBeyond(TensorView tensor, size_t count, float largest);

}  // namespace kvtide
