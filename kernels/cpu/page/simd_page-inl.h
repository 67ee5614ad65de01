// Half a page as the vector kernels see it, its scales, and how a row ends. Included once for each
// instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_PAGE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_PAGE_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_PAGE_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_PAGE_INL_H_
#endif

#include <algorithm>

#include "hwy/aligned_allocator.h"
#include "hwy/cache_control.h"
#include "kernels/cpu/page/page_segment.h"
#include "kernels/cpu/page/simd_softmax-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

constexpr int kMaxGroups = 512 / 32;  // scales of one token

using WidePlane = uint8_t[64 * 512];  // 8 bits at the largest head dim

// Asks for the next page in small steps, spread over the work on this one: the strides inside a page are too
// long for the hardware prefetcher.
struct Prefetcher {
  const uint8_t* next = nullptr;
  const uint8_t* end = nullptr;
  int lines = 0;  // per step
  HWY_INLINE void Step(int steps = 1) {
    const uint8_t* line = next;
    const uint8_t* stop = std::min(line + steps * lines * 64, end);
    for (; line < stop; line += 64) hwy::Prefetch(line);
    next = line;
  }
};

// Half a page, with what both stages need.
struct HalfView {
  const CodeTable* table = nullptr;
  int dim = 0;     // stored
  int groups = 0;  // 0 for f16 and bf16
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  Prefetcher* prefetch = nullptr;
  const KeyRebuild* rebuild = nullptr;  // of calibrated tables, and the position of the page's first token
  int64_t position = 0;
  bool rebuilt() const { return table->calibrated && rebuild->before_rope(); }
};

HWY_INLINE VecF32 LoadHalf(const uint16_t* p, bool bf16) {
  const TagF32 f32;
  if (bf16) return hn::BitCast(f32, hn::ShiftLeft<16>(hn::PromoteTo(TagU32(), hn::LoadU(TagU16Half(), p))));
  return hn::PromoteTo(f32, hn::LoadU(TagF16(), reinterpret_cast<const hwy::float16_t*>(p)));
}

// The 64 scales of a group as f32, at token positions.
HWY_INLINE void LoadScales(const uint8_t* scales, float* HWY_RESTRICT out) {
  const TokenOrder order;
  const auto* p = reinterpret_cast<const uint16_t*>(scales);
  for (int t = 0; t < kBlockTokens; t += TokenOrder::kVectors * kLanes) {
    VecF32 tokens[TokenOrder::kVectors];
    KVTIDE_UNROLL
    for (int i = 0; i < TokenOrder::kVectors; i++) tokens[i] = LoadHalf(p + t + i * kLanes, false);
    order.Store(tokens, out + t);
  }
}

// The scales of one group times the level unit, so that scale times level is the value.
HWY_INLINE void LoadScaledScales(const HalfView& half, int group, float* HWY_RESTRICT out) {
  const TagF32 f32;
  LoadScales(half.scales + group * kBlockTokens * 2, out);
  for (int i = 0; i < kPageVectors; i++)
    hn::Store(hn::Mul(hn::Load(f32, out + i * kLanes), hn::Set(f32, half.table->unit)), f32,
              out + i * kLanes);
}

// Row of a token of an f16 or bf16 page, dims in order; `row` has room for dim values.
HWY_INLINE void DecodeRowHalf(const uint8_t* half, bool bf16, int dim, int token, float* HWY_RESTRICT row) {
  const hn::CappedTag<float, 8> f32;
  const hn::Rebind<uint16_t, decltype(f32)> u16;
  const hn::Rebind<hwy::float16_t, decltype(f32)> f16;
  const hn::Rebind<uint32_t, decltype(f32)> u32;
  const auto* values = reinterpret_cast<const uint16_t*>(half);
  for (int d = 0; d < dim; d += static_cast<int>(hn::Lanes(f32))) {
    const uint16_t* p = values + HalfPrecisionIndex(token, d, dim);
    const auto value = bf16 ? hn::BitCast(f32, hn::ShiftLeft<16>(hn::PromoteTo(u32, hn::LoadU(u16, p))))
                            : hn::PromoteTo(f32, hn::LoadU(f16, reinterpret_cast<const hwy::float16_t*>(p)));
    hn::StoreU(value, f32, row + d);
  }
}

// Writes a finished row: normalised, dims in natural order. Logits beyond f32 have made the sum NaN, and so
// they make lse.
HWY_INLINE void FinishRow(const float* sums, const RowState& state, bool permuted, int dim, float* out,
                          float* lse) {
  const bool seen = state.sum != 0;
  const float inverse = seen ? 1.0f / state.sum : 0.0f;
  if (permuted) {
    for (int p = 0; p < dim; p++) out[DimAtPosition(p)] = sums[p] * inverse;
  } else {
    for (int d = 0; d < dim; d++) out[d] = sums[d] * inverse;
  }
  *lse = seen ? (state.maximum + std::log2(state.sum)) * kLn2 : -INFINITY;
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
