// RoPE of keys by vectors: the arithmetic of the definition (rope.h) in the same order. Included once for
// each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_ROPE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_ROPE_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_ROPE_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_ROPE_INL_H_
#endif

#include "kernels/cpu/page/simd_page-inl.h"
#include "kernels/format/rope.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

template <class D, class V = hn::Vec<D>>
HWY_INLINE void CosSinOfPhases(D f32, hn::Vec<hn::Rebind<uint32_t, D>> phase, V& cosine, V& sine) {
  const hn::Rebind<uint32_t, D> u32;
  const hn::Rebind<int32_t, D> i32;
  const auto quarter = hn::ShiftRight<30>(hn::Add(phase, hn::Set(u32, 0x20000000u)));
  const auto rest = hn::BitCast(i32, hn::Sub(phase, hn::ShiftLeft<30>(quarter)));
  const V x = hn::Mul(hn::ConvertTo(f32, rest), hn::Set(f32, kRadians)), z = hn::Mul(x, x);
  const auto then_add = [](V a, V b, V c) HWY_ATTR { return hn::Add(hn::Mul(a, b), c); };
  V s = then_add(hn::Set(f32, kSine3), z, hn::Set(f32, kSine2));
  s = hn::Mul(then_add(s, z, hn::Set(f32, kSine1)), z);
  s = then_add(s, x, x);
  V c = then_add(hn::Set(f32, kCosine3), z, hn::Set(f32, kCosine2));
  c = then_add(then_add(c, z, hn::Set(f32, kCosine1)), z, hn::Set(f32, -0.5f));
  c = then_add(z, c, hn::Set(f32, 1.0f));
  const auto odd = hn::RebindMask(f32, hn::TestBit(quarter, hn::Set(u32, 1u)));
  const auto two = hn::Set(u32, 2u);
  const auto cosine_sign = hn::ShiftLeft<30>(hn::And(hn::Add(quarter, hn::Set(u32, 1u)), two));
  const auto sine_sign = hn::ShiftLeft<30>(hn::And(quarter, two));
  cosine = hn::Xor(hn::IfThenElse(odd, s, c), hn::BitCast(f32, cosine_sign));
  sine = hn::Xor(hn::IfThenElse(odd, c, s), hn::BitCast(f32, sine_sign));
}

// Turns the keys of a page that begins at `position`: tile [dim][64], tokens at positions.
inline void TurnKeyTile(const KeyRebuild& keys, int64_t position, float* HWY_RESTRICT tile) {
  const TagF32 f32;
  const TagU32 u32;
  alignas(64) uint32_t tokens[kBlockTokens];
  for (int p = 0; p < kBlockTokens; p++) tokens[p] = static_cast<uint32_t>(TokenAtPosition(p));
  for (int i = 0; i < keys.turned; i++) {
    const uint64_t per_position = PerPosition(keys.frequencies[i]);
    const auto begin = hn::Set(u32, PhaseOf(per_position, position, 0));
    const auto step = hn::Set(u32, static_cast<uint32_t>(per_position >> 32));
    float* const first = tile + PairFirstChannel(keys.pairs, i) * kBlockTokens;
    float* const second = tile + PairSecondChannel(keys.pairs, i, keys.turned) * kBlockTokens;
    for (int p = 0; p < kBlockTokens; p += kLanes) {
      VecF32 cosine, sine;
      CosSinOfPhases(f32, hn::Add(begin, hn::Mul(step, hn::Load(u32, tokens + p))), cosine, sine);
      const VecF32 x = hn::Load(f32, first + p), y = hn::Load(f32, second + p);
      hn::Store(hn::Add(hn::Mul(hn::Neg(y), sine), hn::Mul(x, cosine)), f32, first + p);
      hn::Store(hn::Add(hn::Mul(x, sine), hn::Mul(y, cosine)), f32, second + p);
    }
  }
}

// Turns rows [tokens][dim] back whose first is token `first` of the page.
inline void TurnBackRows(const KeyRebuild& keys, int64_t position, int first, int tokens, float* rows) {
  const hn::CappedTag<float, 8> f32;
  const hn::Rebind<uint32_t, decltype(f32)> u32;
  const int lanes = static_cast<int>(hn::Lanes(f32)), n = keys.turned;
  alignas(64) uint32_t begin[256], step[256];
  alignas(64) float cosine[256], sine[256];
  for (int i = 0; i < n; i++) {
    const uint64_t per_position = PerPosition(keys.frequencies[i]);
    begin[i] = PhaseOf(per_position, position, 0);
    step[i] = static_cast<uint32_t>(per_position >> 32);
  }
  for (int i = n; i % lanes != 0; i++) begin[i] = step[i] = 0;
  for (int t = 0; t < tokens; t++) {
    const auto token = hn::Set(u32, static_cast<uint32_t>(first + t));
    for (int i = 0; i < n; i += lanes) {
      hn::Vec<decltype(f32)> c, s;
      CosSinOfPhases(f32, hn::Add(hn::Load(u32, begin + i), hn::Mul(hn::Load(u32, step + i), token)), c, s);
      hn::Store(c, f32, cosine + i);
      hn::Store(s, f32, sine + i);
    }
    float* const row = rows + t * keys.dim;
    for (int i = 0; i < n; i++)
      TurnPair({cosine[i], -sine[i]}, row + PairFirstChannel(keys.pairs, i),
               row + PairSecondChannel(keys.pairs, i, n));
  }
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
