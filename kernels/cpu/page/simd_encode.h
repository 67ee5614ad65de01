// Vector versions of the encoder and of what appends need, byte for byte equal to the definition
// (page_codec.h).
#pragma once

#include "kernels/cpu/page/page_kernels.h"

namespace kvtide {

// Sets store_rows, encode and decode of a table; leaves it alone if the build lacks the level.
void UseSimdEncoders(SimdLevel level, PageKernels& kernels);

}  // namespace kvtide
