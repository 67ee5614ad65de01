// Vector versions of what turns rows of f16 and bf16 tensors into f32 and back, bit for bit those of
// float16.h.
#pragma once

#include "kernels/cpu/page/page_kernels.h"

namespace kvtide {

// Sets widen and narrow of a table; leaves it alone if the build lacks the level.
void UseSimdConversions(SimdLevel level, PageKernels& kernels);

}  // namespace kvtide
