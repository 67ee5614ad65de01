// PageKernels: the functions of the CPU backend that depend on the vector unit, as a table, one table per
// SIMD level. All of them work on the pages of one KV head, keep no state and may be called from any thread.
// Every level gives the same bytes when it encodes; attention agrees within rounding.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/base/data_type.h"
#include "kernels/base/finite.h"
#include "kernels/cpu/page/page_segment.h"
#include "kernels/cpu/page/simd_level.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"

namespace kvtide {

struct PageKernels {
  const char* name = "";
  SimdLevel level = SimdLevel::kPlain;
  // Attention of the rows over the segment: out [rows][stored_dim_v] in the frame in which V is stored, lse
  // [rows] (natural log, -inf and output 0 where a row sees nothing).
  // `attend` suits a few rows (decoding), `attend_many` many (prefill); either takes any number.
  void (*attend)(const PageSegment& segment, const QueryRows& rows, float* out, float* lse) = nullptr;
  void (*attend_many)(const PageSegment& segment, const QueryRows& rows, float* out, float* lse) = nullptr;
  // Turns a vector of stored_dim values into the rotated frame of a type, or back.
  void (*rotate)(CacheType type, bool inverse, float* x, int stored_dim) = nullptr;
  // As TurnTideQuery of tide_codec.h.
  float (*turn_query)(CacheType type, const HeadProfile& head, int stored_dim, float* query) = nullptr;
  // `count` values of a tensor from element `first` on as f32, and f32 values rounded to the tensor's type
  // there (f16 holds at most +-65504; NaN stays NaN).
  void (*widen)(TensorView from, size_t first, size_t count, float* to) = nullptr;
  void (*narrow)(const float* from, size_t count, MutableTensorView to, size_t first) = nullptr;
  // Writes `tokens` rows, `stride` elements apart, behind the first `first_token` tokens of an f16 or bf16
  // half page.
  void (*store_rows)(CacheType type, const HalfLayout& layout, TensorView rows, size_t first_element,
                     size_t stride, int first_token, int tokens, std::byte* half) = nullptr;
  // As EncodeHalf and DecodeHalf of page_codec.h.
  void (*encode)(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                 int64_t position, const float* rows, int tokens, std::byte* half) = nullptr;
  void (*decode)(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                 int64_t position, const std::byte* half, float* rows) = nullptr;
};

// What narrow does, for one value.
inline void StoreElement(float value, MutableTensorView to, size_t i) {
  to.Set(i, to.type == DataType::kF16 ? std::clamp(value, -kMaxF16, kMaxF16) : value);
}

// What keys of a calibrated type are rebuilt with; it points into the profile.
KeyRebuild MakeKeyRebuild(CacheType type, const HeadProfile& profile);

// The pages of a KV head in a run of blocks. `profile`, which may be null, is that of the head; the segment
// of a calibrated type points into it.
PageSegment MakePageSegment(const BlockLayout& layout, int layer, int kv_head, const HeadProfile* profile,
                            std::span<std::byte* const> blocks, int64_t first_position, int64_t tokens);

// The levels that this build has and this processor can run, plain first, best last.
std::vector<SimdLevel> SupportedSimdLevels();
// The table of a level; null if it is not supported. kBest is always supported.
const PageKernels* FindPageKernels(SimdLevel level);

}  // namespace kvtide
