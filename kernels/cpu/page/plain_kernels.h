// The plain kernels: no vector intrinsics, any processor, any cache type. They are what faster kernels are
// compared with in tests, and what runs where no vector unit is supported.
#pragma once

#include "kernels/cpu/page/page_kernels.h"

namespace kvtide {

const PageKernels& PlainKernels();

}  // namespace kvtide
