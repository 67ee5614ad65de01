// Tensor maps through which the copy engine fetches boxes of 64 dims and 64 tokens of f16 pages
// (prefill_pages.h).
#pragma once

#include <cuda.h>

#include <cstddef>

#include "absl/status/status.h"

namespace kvtide::cuda {

struct PageMaps {
  CUtensorMap blocks{}, scratch{};
};

// Rows of `dim` values, a multiple of 64, from `base` on, which is a multiple of 16 bytes.
absl::Status MakePageMap(const std::byte* base, int dim, CUtensorMap* map);

}  // namespace kvtide::cuda
