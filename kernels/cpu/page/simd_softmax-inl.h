// Vector softmax of rows over one page, in base 2. Included once for each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_SOFTMAX_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_SOFTMAX_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_SOFTMAX_INL_H_
#endif

#include <cmath>

#include "kernels/cpu/page/simd_unpack-inl.h"
#include "kernels/format/page_order.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

constexpr float kLog2E = 1.44269504088896f, kLn2 = 0.69314718055995f;

// 2^x for x <= 127; 0 for x <= -127; NaN for NaN. Relative error 2.4e-6 of the polynomial.
HWY_INLINE VecF32 Exp2(VecF32 x) {
  const TagF32 f32;
  const TagI32 i32;
  x = AtLeast(hn::Set(f32, -127.0f), x);
  const VecI32 whole = NearestSmallInt(x);
  const VecF32 part = hn::Sub(x, hn::ConvertTo(f32, whole));
  VecF32 p = hn::Set(f32, 1.3333558e-3f);
  p = hn::MulAdd(p, part, hn::Set(f32, 9.6181291e-3f));
  p = hn::MulAdd(p, part, hn::Set(f32, 5.5504109e-2f));
  p = hn::MulAdd(p, part, hn::Set(f32, 2.4022651e-1f));
  p = hn::MulAdd(p, part, hn::Set(f32, 6.9314718e-1f));
  p = hn::MulAdd(p, part, hn::Set(f32, 1.0f));
  const VecI32 exponent = hn::ShiftLeft<23>(hn::Add(whole, hn::Set(i32, 127)));
  return hn::Mul(p, hn::BitCast(f32, exponent));
}

// The same for one number: no call into the library, which would empty the vector registers.
HWY_INLINE float Exp2(float x) { return hn::GetLane(Exp2(hn::Set(TagF32(), x))); }

// By exponentials, whose error is absolute, for large x, and by its series for small ones: a large soft-cap
// multiplies it again. Relative error 1e-5.
HWY_INLINE VecF32 Tanh(VecF32 x) {
  const TagF32 f32;
  const VecF32 bound = hn::Set(f32, 20.0f);
  x = AtMost(bound, AtLeast(hn::Neg(bound), x));
  const VecF32 e = Exp2(hn::Mul(x, hn::Set(f32, 2 * kLog2E)));
  const VecF32 one = hn::Set(f32, 1.0f);
  const VecF32 large = hn::Div(hn::Sub(e, one), hn::Add(e, one));
  const VecF32 square = hn::Mul(x, x);
  VecF32 series = hn::MulAdd(square, hn::Set(f32, -17.0f / 315), hn::Set(f32, 2.0f / 15));
  series = hn::MulAdd(series, square, hn::Set(f32, -1.0f / 3));
  series = hn::MulAdd(hn::Mul(series, square), x, x);
  return hn::IfThenElse(hn::Lt(hn::Abs(x), hn::Set(f32, 0.25f)), series, large);
}

// How the dots of a row become logits: (dot * factor + bias), soft-capped.
struct LogitScale {
  float factor = 0, bias = 0, softcap = 0;
};

struct RowState {
  float maximum = -INFINITY;  // of the logits so far, base 2
  float sum = 0;              // of 2^(logit - maximum)
};
// What a page does to a row: the output so far times `keep`, the page's weights times `page`.
struct PageFactors {
  float keep = 1, page = 0;
};

// Turns 64 dots (at token positions) into logits, -infinity outside tokens [first, last) of the page,
// whatever the dots are there. Returns the largest of each lane.
HWY_INLINE VecF32 PageLogits(float* HWY_RESTRICT dots, const LogitScale& scale, int first, int last) {
  const TagF32 f32;
  const TagI32 i32;
  VecF32 logits[kPageVectors];
  const bool capped = scale.softcap > 0;
  const float to_base2 = capped ? 1.0f : kLog2E;
  const VecF32 factor = hn::Set(f32, scale.factor * to_base2), bias = hn::Set(f32, scale.bias * to_base2);
  KVTIDE_UNROLL
  for (int i = 0; i < kPageVectors; i++)
    logits[i] = hn::MulAdd(hn::Load(f32, dots + i * kLanes), factor, bias);
  if (capped) {
    const VecF32 inverse = hn::Set(f32, 1.0f / scale.softcap), cap = hn::Set(f32, scale.softcap * kLog2E);
    for (int i = 0; i < kPageVectors; i++) logits[i] = hn::Mul(Tanh(hn::Mul(logits[i], inverse)), cap);
  }
  if (first > 0 || last < kBlockTokens) {
    alignas(64) int32_t tokens[kBlockTokens];
    for (int p = 0; p < kBlockTokens; p++) tokens[p] = TokenAtPosition(p);
    for (int i = 0; i < kPageVectors; i++) {
      const VecI32 token = hn::Load(i32, tokens + i * kLanes);
      const auto seen = hn::And(hn::Gt(token, hn::Set(i32, first - 1)), hn::Lt(token, hn::Set(i32, last)));
      logits[i] = hn::IfThenElse(hn::RebindMask(f32, seen), logits[i], hn::Set(f32, -INFINITY));
    }
  }
  VecF32 maxima = logits[0];
  KVTIDE_UNROLL
  for (int i = 1; i < kPageVectors; i++) maxima = hn::Max(maxima, logits[i]);
  KVTIDE_UNROLL
  for (int i = 0; i < kPageVectors; i++) hn::Store(logits[i], f32, dots + i * kLanes);
  return maxima;
}

// Turns logits into weights relative to `maximum`, which is finite. Returns the sum of each lane.
HWY_INLINE VecF32 PageWeights(float* HWY_RESTRICT logits, float maximum) {
  const TagF32 f32;
  VecF32 sums = hn::Zero(f32);
  KVTIDE_UNROLL
  for (int i = 0; i < kPageVectors; i++) {
    const VecF32 weight = Exp2(hn::Sub(hn::Load(f32, logits + i * kLanes), hn::Set(f32, maximum)));
    sums = hn::Add(sums, weight);
    hn::Store(weight, f32, logits + i * kLanes);
  }
  return sums;
}

constexpr int kMostRows = 8;  // that a page meets together
constexpr int kRowVectors = kLanes < kMostRows ? kMostRows / kLanes : 1, kRowLanes = kRowVectors * kLanes;

// States of up to kMostRows rows, one in each lane.
struct RowStates {
  alignas(64) float maximum[kRowLanes], sum[kRowLanes];
  RowStates() {
    for (int i = 0; i < kRowLanes; i++) maximum[i] = -INFINITY, sum[i] = 0;
  }
  RowState Row(int r) const { return {maximum[r], sum[r]}; }
};

// Turns the 64 dots of every row into weights relative to the row's largest logit on the page, and updates
// the states. Tokens outside [first[r], last[r]) get weight 0. The rows go through each step together: alone
// they would wait for one another's chains of reductions and exponentials.
template <int kRows>
HWY_INLINE void SoftmaxPage(float* HWY_RESTRICT dots, const LogitScale* scale, const int* first,
                            const int* last, RowStates& states, PageFactors* factors) {
  static_assert(kRows <= kMostRows);
  const TagF32 f32;
  alignas(64) float page_maximum[kRowLanes] = {}, page_sum[kRowLanes] = {}, keep[kRowLanes], page[kRowLanes];
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++) {
    const VecF32 maxima = PageLogits(dots + r * kBlockTokens, scale[r], first[r], last[r]);
    page_maximum[r] = hn::GetLane(hn::MaxOfLanes(f32, maxima));
  }
  // Rows without a token have the maximum -infinity; 0 in its place makes weights of 0 without a NaN.
  const VecF32 none = hn::Set(f32, -INFINITY), zero = hn::Zero(f32);
  VecF32 keep_factors[kRowVectors], page_factors[kRowVectors];
  KVTIDE_UNROLL
  for (int i = 0; i < kRowVectors; i++) {
    const VecF32 before = hn::Load(f32, states.maximum + i * kLanes),
                 here = hn::Load(f32, page_maximum + i * kLanes);
    const VecF32 after = hn::Max(before, here);
    const VecF32 relative_to = hn::IfThenElse(hn::Eq(after, none), zero, after);
    keep_factors[i] = Exp2(hn::Sub(before, relative_to));
    page_factors[i] = Exp2(hn::Sub(here, relative_to));
    hn::Store(after, f32, states.maximum + i * kLanes);
    hn::Store(keep_factors[i], f32, keep + i * kLanes);
    hn::Store(page_factors[i], f32, page + i * kLanes);
  }
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++) {
    const float maximum = page_maximum[r] == -INFINITY ? 0.0f : page_maximum[r];
    page_sum[r] = hn::GetLane(hn::SumOfLanes(f32, PageWeights(dots + r * kBlockTokens, maximum)));
    factors[r] = {keep[r], page[r]};
  }
  KVTIDE_UNROLL
  for (int i = 0; i < kRowVectors; i++)
    hn::Store(hn::MulAdd(hn::Load(f32, states.sum + i * kLanes), keep_factors[i],
                         hn::Mul(hn::Load(f32, page_sum + i * kLanes), page_factors[i])),
              f32, states.sum + i * kLanes);
}

// The same for one row with a state of its own.
HWY_INLINE PageFactors SoftmaxPage(float* HWY_RESTRICT dots, const LogitScale& scale, int first, int last,
                                   RowState& state) {
  const TagF32 f32;
  if (first >= last) {
    for (int i = 0; i < kPageVectors; i++) hn::Store(hn::Zero(f32), f32, dots + i * kLanes);
    return {};
  }
  const float page_maximum = hn::GetLane(hn::MaxOfLanes(f32, PageLogits(dots, scale, first, last)));
  const float sum =
      hn::GetLane(hn::SumOfLanes(f32, PageWeights(dots, page_maximum == -INFINITY ? 0.0f : page_maximum)));
  if (page_maximum == -INFINITY) {  // logits below f32: weights of 0, or NaN among them
    state.sum += sum;
    return {};
  }
  PageFactors factors{1, 1};
  if (page_maximum > state.maximum) {
    factors.keep = Exp2(state.maximum - page_maximum);
    state.maximum = page_maximum;
  } else {
    factors.page = Exp2(page_maximum - state.maximum);
  }
  state.sum = state.sum * factors.keep + sum * factors.page;
  return factors;
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
