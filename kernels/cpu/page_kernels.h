// PageKernels: the functions of the CPU backend that depend on the vector unit, as a table, one table per
// SIMD level. All of them work on the pages of one KV head, keep no state and may be called from any thread.
// Every level gives the same bytes when it encodes; attention agrees within rounding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/base/data_type.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"

namespace kvtide {

enum class SimdLevel : uint8_t { kBest, kPlain, kAvx2, kAvx512 };

// Pages of one KV head: the records at `record_offset` in consecutive blocks of one sequence.
struct PageSegment {
  const BlockLayout* layout = nullptr;
  size_t record_offset = 0;
  std::span<std::byte* const> blocks;
  int64_t first_position = 0;  // of the first token of blocks[0]
  int64_t tokens = 0;          // tokens that count, from there on
};

// The queries that look at one KV head, one row for each (query, query head).
struct QueryRows {
  int rows = 0;
  const float* q = nullptr;        // [rows][stored_dim_k], in the frame in which K is stored
  const float* bias = nullptr;     // [rows], added to q.k; null = none
  const int64_t* begin = nullptr;  // [rows] row r sees positions begin[r] <= p < end[r]
  const int64_t* end = nullptr;
  float scale = 0, softcap = 0;  // as in AttendArgs
};

struct PageKernels {
  const char* name = "";
  SimdLevel level = SimdLevel::kPlain;
  // Attention of the rows over the segment: out [rows][stored_dim_v] in the frame in which V is stored, lse
  // [rows] (natural log, -inf and output 0 where a row sees nothing).
  // `attend` suits a few rows (decoding), `attend_many` many (prefill); either takes any number.
  void (*attend)(const PageSegment& segment, const QueryRows& rows, float* out, float* lse) = nullptr;
  void (*attend_many)(const PageSegment& segment, const QueryRows& rows, float* out, float* lse) = nullptr;
  // Writes `tokens` rows, `stride` elements apart, behind the first `first_token` tokens of an f16 or bf16
  // half page.
  void (*store_rows)(CacheType type, const HalfLayout& layout, TensorView rows, size_t first_element,
                     size_t stride, int first_token, int tokens, std::byte* half) = nullptr;
  // As EncodeHalf and DecodeHalf of page_codec.h.
  void (*encode)(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                 const float* rows, int tokens, std::byte* half) = nullptr;
  void (*decode)(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                 const std::byte* half, float* rows) = nullptr;
};

// The levels that this build has and this processor can run, plain first, best last.
std::vector<SimdLevel> SupportedSimdLevels();
// The table of a level; null if it is not supported. kBest is always supported.
const PageKernels* FindPageKernels(SimdLevel level);
const char* SimdLevelName(SimdLevel level);

}  // namespace kvtide
