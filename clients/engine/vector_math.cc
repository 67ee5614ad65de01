#include "clients/engine/vector_math.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "clients/engine/vector_math.cc"
// What follows foreach_target.h is compiled once for each instruction set.
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtide::engine {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Vector = hn::Vec<Floats>;

// Calls whole(i) for every full vector and part(i) for the elements that are left.
template <class Whole, class Part>
HWY_INLINE void ForEach(size_t n, const Whole& whole, const Part& part) {
  const size_t lanes = hn::Lanes(Floats());
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) whole(i);
  for (; i < n; ++i) part(i);
}

HWY_INLINE float SumOfLanes(Vector v) { return hn::GetLane(hn::SumOfLanes(Floats(), v)); }

void RmsNormRow(const float* x, const float* weight, size_t n, float epsilon, float* out) {
  const Floats d;
  Vector squares = hn::Zero(d);
  float rest = 0;
  ForEach(
      n,
      [&](size_t i) {
        const Vector v = hn::LoadU(d, x + i);
        squares = hn::MulAdd(v, v, squares);
      },
      [&](size_t i) { rest += x[i] * x[i]; });
  const float factor = 1.0f / std::sqrt((SumOfLanes(squares) + rest) / static_cast<float>(n) + epsilon);
  const Vector f = hn::Set(d, factor);
  ForEach(
      n,
      [&](size_t i) {
        hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(d, x + i), f), hn::LoadU(d, weight + i)), d, out + i);
      },
      [&](size_t i) { out[i] = x[i] * factor * weight[i]; });
}

// exp(-x), 1e38 at most: Highway's Exp gives nonsense above 104.
HWY_INLINE Vector ExpOfNegative(Vector x) {
  const Floats d;
  return hn::Exp(d, hn::Min(hn::Neg(x), hn::Set(d, 87.0f)));
}

void SiluMultiplyRow(float* gate, const float* up, size_t n) {
  const Floats d;
  const Vector one = hn::Set(d, 1.0f);
  ForEach(
      n,
      [&](size_t i) {
        const Vector g = hn::LoadU(d, gate + i);
        const Vector silu = hn::Div(g, hn::Add(one, ExpOfNegative(g)));
        hn::StoreU(hn::Mul(silu, hn::LoadU(d, up + i)), d, gate + i);
      },
      [&](size_t i) { gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i]; });
}

// x * sigmoid(2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3) is the tanh form of GELU.
void GeluMultiplyRow(float* gate, const float* up, size_t n) {
  constexpr float kTwice = 1.5957691216057308f, kCubic = 0.044715f;
  const Floats d;
  const Vector one = hn::Set(d, 1.0f);
  ForEach(
      n,
      [&](size_t i) {
        const Vector g = hn::LoadU(d, gate + i);
        const Vector u =
            hn::Mul(hn::Mul(g, hn::Set(d, kTwice)), hn::MulAdd(hn::Mul(g, g), hn::Set(d, kCubic), one));
        const Vector gelu = hn::Div(g, hn::Add(one, ExpOfNegative(u)));
        hn::StoreU(hn::Mul(gelu, hn::LoadU(d, up + i)), d, gate + i);
      },
      [&](size_t i) {
        const float g = gate[i], u = g * kTwice * (g * g * kCubic + 1.0f);
        gate[i] = g / (1.0f + std::exp(-u)) * up[i];
      });
}

// tanh(y) = 1 - 2 / (exp(2y) + 1).
void SoftCapRow(float* x, size_t n, float cap) {
  const Floats d;
  const Vector one = hn::Set(d, 1.0f), two = hn::Set(d, 2.0f), factor = hn::Set(d, 2 / cap);
  ForEach(
      n,
      [&](size_t i) {
        const Vector e = hn::Exp(d, hn::Min(hn::Mul(hn::LoadU(d, x + i), factor), hn::Set(d, 80.0f)));
        hn::StoreU(hn::Mul(hn::Set(d, cap), hn::Sub(one, hn::Div(two, hn::Add(e, one)))), d, x + i);
      },
      [&](size_t i) { x[i] = cap * std::tanh(x[i] / cap); });
}

void AddToRow(float* x, const float* y, size_t n) {
  const Floats d;
  ForEach(
      n, [&](size_t i) { hn::StoreU(hn::Add(hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, x + i); },
      [&](size_t i) { x[i] += y[i]; });
}

void ScaleRow(float* x, size_t n, float factor) {
  const Floats d;
  const Vector f = hn::Set(d, factor);
  ForEach(
      n, [&](size_t i) { hn::StoreU(hn::Mul(hn::LoadU(d, x + i), f), d, x + i); },
      [&](size_t i) { x[i] *= factor; });
}

float MaximumOfRow(const float* x, size_t n) {
  const Floats d;
  float rest = -std::numeric_limits<float>::infinity();
  Vector most = hn::Set(d, rest);
  ForEach(
      n, [&](size_t i) { most = hn::Max(most, hn::LoadU(d, x + i)); },
      [&](size_t i) { rest = std::max(rest, x[i]); });
  return std::max(rest, hn::GetLane(hn::MaxOfLanes(d, most)));
}

float ExpShiftedRow(float* x, size_t n, float shift) {
  const Floats d;
  const Vector s = hn::Set(d, shift);
  Vector sum = hn::Zero(d);
  float rest = 0;
  ForEach(
      n,
      [&](size_t i) {
        const Vector e = hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), s));
        hn::StoreU(e, d, x + i);
        sum = hn::Add(sum, e);
      },
      [&](size_t i) {
        x[i] = std::exp(x[i] - shift);
        rest += x[i];
      });
  return SumOfLanes(sum) + rest;
}

float SumOfExp(const float* x, size_t n, float shift) {
  const Floats d;
  const Vector s = hn::Set(d, shift);
  Vector sum = hn::Zero(d);
  float rest = 0;
  ForEach(
      n, [&](size_t i) { sum = hn::Add(sum, hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), s))); },
      [&](size_t i) { rest += std::exp(x[i] - shift); });
  return SumOfLanes(sum) + rest;
}

// sum of softmax(p) * (p - q): the divergence but for the two log-sum-exps.
float WeightedDifference(const float* p, float p_lse, const float* q, size_t n) {
  const Floats d;
  const Vector s = hn::Set(d, p_lse);
  Vector sum = hn::Zero(d);
  float rest = 0;
  ForEach(
      n,
      [&](size_t i) {
        const Vector a = hn::LoadU(d, p + i);
        sum = hn::MulAdd(hn::Exp(d, hn::Sub(a, s)), hn::Sub(a, hn::LoadU(d, q + i)), sum);
      },
      [&](size_t i) { rest += std::exp(p[i] - p_lse) * (p[i] - q[i]); });
  return SumOfLanes(sum) + rest;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtide::engine
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtide::engine {

HWY_EXPORT(RmsNormRow);
HWY_EXPORT(SiluMultiplyRow);
HWY_EXPORT(GeluMultiplyRow);
HWY_EXPORT(SoftCapRow);
HWY_EXPORT(AddToRow);
HWY_EXPORT(ScaleRow);
HWY_EXPORT(MaximumOfRow);
HWY_EXPORT(ExpShiftedRow);
HWY_EXPORT(SumOfExp);
HWY_EXPORT(WeightedDifference);

void RmsNorm(const float* x, const float* weight, size_t n, float epsilon, float* out) {
  HWY_DYNAMIC_DISPATCH(RmsNormRow)(x, weight, n, epsilon, out);
}

void SiluMultiply(float* gate, const float* up, size_t n) {
  HWY_DYNAMIC_DISPATCH(SiluMultiplyRow)(gate, up, n);
}

void GeluMultiply(float* gate, const float* up, size_t n) {
  HWY_DYNAMIC_DISPATCH(GeluMultiplyRow)(gate, up, n);
}

void SoftCap(float* x, size_t n, float cap) { HWY_DYNAMIC_DISPATCH(SoftCapRow)(x, n, cap); }

void AddTo(float* x, const float* y, size_t n) { HWY_DYNAMIC_DISPATCH(AddToRow)(x, y, n); }

void Scale(float* x, size_t n, float factor) { HWY_DYNAMIC_DISPATCH(ScaleRow)(x, n, factor); }

float Maximum(const float* x, size_t n) { return HWY_DYNAMIC_DISPATCH(MaximumOfRow)(x, n); }

float ExpShifted(float* x, size_t n, float shift) { return HWY_DYNAMIC_DISPATCH(ExpShiftedRow)(x, n, shift); }

double LogSumExp(const float* x, size_t n) {
  const float shift = Maximum(x, n);
  return shift + std::log(static_cast<double>(HWY_DYNAMIC_DISPATCH(SumOfExp)(x, n, shift)));
}

double KlDivergence(const float* p, double p_lse, const float* q, double q_lse, size_t n) {
  // KL = sum softmax(p) * ((p - p_lse) - (q - q_lse)); the weights sum to 1, so the constants stand outside.
  const double sum = HWY_DYNAMIC_DISPATCH(WeightedDifference)(p, static_cast<float>(p_lse), q, n);
  return std::max(0.0, sum - p_lse + q_lse);
}

}  // namespace kvtide::engine
#endif  // HWY_ONCE
