// Rows of pages in f16 or bf16 that come and go in the page's own type: their bits are moved, eight values at
// a time, without a way through f32. Finite values only: what a NaN holds may differ from what a conversion
// would make of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/base/data_type.h"
#include "kernels/cpu/code_table.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/catalogue.h"

namespace kvtide {

// Whether pages of `page` hold the bits that rows of `rows` have.
inline bool SameBits(CacheType page, DataType rows) {
  const CodeTable& table = CodeTableOf(page);
  return !table.coded() && rows == (table.bf16 ? DataType::kBf16 : DataType::kF16);
}

// `tokens` rows of half.head_dim values, `stride` values apart, become tokens [first_token, + tokens) of a
// page half; values beyond head_dim become 0.
inline void MoveRowsIn(const HalfLayout& half, const uint16_t* rows, size_t stride, int first_token,
                       int tokens, std::byte* page) {
  for (int i = 0; i < tokens; i++, rows += stride)
    for (int d = 0; d < half.stored_dim; d += 8) {
      std::byte* const to =
          page + 2 * static_cast<size_t>(HalfPrecisionIndex(first_token + i, d, half.stored_dim));
      if (d < half.head_dim) {
        std::memcpy(to, rows + d, 16);
      } else {
        std::memset(to, 0, 16);
      }
    }
}

// The way back.
inline void MoveRowsOut(const HalfLayout& half, const std::byte* page, int first_token, int tokens,
                        uint16_t* rows, size_t stride) {
  for (int i = 0; i < tokens; i++, rows += stride)
    for (int d = 0; d < half.head_dim; d += 8)
      std::memcpy(rows + d,
                  page + 2 * static_cast<size_t>(HalfPrecisionIndex(first_token + i, d, half.stored_dim)),
                  16);
}

}  // namespace kvtide
