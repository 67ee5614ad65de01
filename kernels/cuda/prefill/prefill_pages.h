// Where a prefill finds f16 pages: rows of D values, 64 of keys and 64 of values a page, counted from a base
// address. Pages lie in the caller's blocks or in scratch memory, each with a base of its own. Plain
// arithmetic, so that it is tested without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/format/page_order.h"

namespace kvtide::cuda {

// The row of a page's first key; with the bit: in scratch memory.
using PagePlace = uint32_t;
inline constexpr PagePlace kScratchPlace = 1u << 31;
inline constexpr int kRowsOfPage = 2 * kBlockTokens;

// The place of a page in blocks, or false where no row begins or which is too far away.
inline bool PlaceOfPage(const std::byte* base, const std::byte* page, int dim, PagePlace* place) {
  if (page < base) return false;
  const auto bytes = static_cast<uint64_t>(page - base), row_bytes = static_cast<uint64_t>(2 * dim);
  *place = static_cast<PagePlace>(bytes / row_bytes);
  return bytes % row_bytes == 0 && bytes / row_bytes <= kScratchPlace - kRowsOfPage;
}
inline PagePlace PlaceInScratch(size_t page) {
  return kScratchPlace | static_cast<PagePlace>(page * kRowsOfPage);
}

}  // namespace kvtide::cuda
