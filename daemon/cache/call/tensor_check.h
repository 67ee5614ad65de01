// Checks tensors from outside before a byte of them is written: sizes, and values that f16 cannot hold.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/data_type.h"
#include "kernels/base/finite.h"

namespace kvtide {

// InvalidArgument if a position from outside is negative: "`what` -1 is negative".
absl::Status CheckPosition(int64_t position, const char* what);

// InvalidArgument if `elements` is not tokens x heads x dim; 0 elements = the caller has checked.
absl::Status CheckElements(size_t elements, int64_t tokens, int heads, int dim, const char* what, int layer);

// InvalidArgument that names `what` ("K", "V", "q"), the layer, the token's position, the head and the index
// in the head of the first value that is NaN, infinite or beyond f16. `tensor` is [tokens][heads][dim], its
// first row at `position`.
absl::Status CheckValues(const TensorView& tensor, int64_t tokens, int heads, int dim, const char* what,
                         int layer, int64_t position);

// The same for queries, which are computed in f32: only NaN and infinities are errors.
absl::Status CheckFinite(const TensorView& tensor, int64_t tokens, int heads, int dim, const char* what,
                         int layer, int64_t position);

}  // namespace kvtide
