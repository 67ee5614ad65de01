// Rows of pages in f16 or bf16 that come and go in the page's own type: their bits are moved, eight values at
// a time, without a way through f32. Finite values only: what a NaN holds may differ from what a conversion
// would make of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "kernels/base/data_type.h"
#include "kernels/cpu/page/code_table.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/page_order.h"

namespace kvtide {

// Whether pages of `page` hold the bits that rows of `rows` have.
inline bool SameBits(CacheType page, DataType rows) {
  const CodeTable& table = CodeTableOf(page);
  return !table.coded() && rows == (table.bf16 ? DataType::kBf16 : DataType::kF16);
}

// Where the pages of the heads of one layer lie: that of head h at `first` + h * `stride` bytes.
template <class Byte>
struct HeadPages {
  Byte* first = nullptr;
  size_t stride = 0;
  int heads = 1;
};

namespace half_rows {

// Source chunk of a target chunk of 8 values, and the other way round: HalfPrecisionIndex.
inline int ChunkOrder(const HalfLayout& half, int token) {
  return HalfPrecisionIndex(token, 0, half.stored_dim) / 8 - token * half.stored_dim / 8;
}

// 16 bytes into a page; `kStream`: past the caches, to a multiple of 16 bytes.
template <bool kStream>
inline void MoveChunk(const uint16_t* from, std::byte* to) {
#ifdef __SSE2__
  if constexpr (kStream) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return;
  }
#endif
  std::memcpy(to, from, 16);
}

// A row of a page, from its first chunk to its last.
template <bool kStream>
inline void MoveRowIn(const HalfLayout& half, const uint16_t* row, int token, std::byte* page) {
  const int order = ChunkOrder(half, token);
  std::byte* to = page + 2 * token * half.stored_dim;
  constexpr int kLines = 64;  // values of two cache lines, inside of which chunks change places
  if (half.head_dim % kLines == 0) {
    for (int d = 0; d < half.head_dim; d += kLines, row += kLines, to += 2 * kLines)
      for (int c = 0; c < 8; c++) MoveChunk<kStream>(row + 8 * (c ^ order), to + 16 * c);
    return;
  }
  for (int c = 0; c < half.stored_dim / 8; c++, to += 16) {
    const int d = 8 * (c ^ order);
    if (d < half.head_dim) {
      MoveChunk<kStream>(row + d, to);
    } else {
      std::memset(to, 0, 16);
    }
  }
}

template <bool kStream>
inline void MoveRowsIn(const HalfLayout& half, const uint16_t* rows, size_t stride, int first_token,
                       int tokens, const HeadPages<std::byte>& pages) {
  for (int token = first_token; token < first_token + tokens; token++, rows += stride)
    for (int head = 0; head < pages.heads; head++)
      MoveRowIn<kStream>(half, rows + head * half.head_dim, token,
                         pages.first + static_cast<size_t>(head) * pages.stride);
}

}  // namespace half_rows

// `tokens` rows of all heads, [heads][half.head_dim] values of a token side by side and tokens `stride`
// values apart, become tokens [first_token, + tokens) of the pages; values beyond head_dim become 0. Tokens
// are the outer loop: rows are read as they lie in memory. Many of them go past the caches, since nobody
// looks at them soon, and the lines that they fill are not read first: twice the speed of a plain copy.
inline void MoveRowsIn(const HalfLayout& half, const uint16_t* rows, size_t stride, int first_token,
                       int tokens, const HeadPages<std::byte>& pages) {
  constexpr int kMany = 16;
  if (tokens < kMany || (reinterpret_cast<uintptr_t>(pages.first) | pages.stride) % 16 != 0)
    return half_rows::MoveRowsIn<false>(half, rows, stride, first_token, tokens, pages);
  half_rows::MoveRowsIn<true>(half, rows, stride, first_token, tokens, pages);
#ifdef __SSE2__
  _mm_sfence();  // before anybody is told that the rows are there
#endif
}

// The way back.
inline void MoveRowsOut(const HalfLayout& half, const HeadPages<const std::byte>& pages, int first_token,
                        int tokens, uint16_t* rows, size_t stride) {
  for (int token = first_token; token < first_token + tokens; token++, rows += stride) {
    const int order = half_rows::ChunkOrder(half, token);
    for (int head = 0; head < pages.heads; head++) {
      const std::byte* const row = pages.first + static_cast<size_t>(head) * pages.stride +
                                   2 * static_cast<size_t>(token) * static_cast<size_t>(half.stored_dim);
      uint16_t* const to = rows + head * half.head_dim;
      for (int c = 0; c < half.head_dim / 8; c++) std::memcpy(to + 8 * c, row + 16 * (c ^ order), 16);
    }
  }
}

}  // namespace kvtide
