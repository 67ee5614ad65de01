// Keys of calibrated types to half pages and back: the arithmetic of the definition (tide_codec.h) in the
// same order, by vectors of pairs, coefficients, groups or tokens. Included once for each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_TIDE_ENCODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_TIDE_ENCODE_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_TIDE_ENCODE_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_TIDE_ENCODE_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "kernels/cpu/page/page_kernels.h"
#include "kernels/cpu/page/simd_rebuild-inl.h"
#include "kernels/format/tide_codec.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// z [tokens][dim] = x [tokens][dim] times matrix [dim][dim], every sum from the first channel to the last.
// At most 16 coefficients at a time, because head dims are multiples of 16.
template <int kTokens>
HWY_INLINE void MultiplyRows(const float* HWY_RESTRICT x, const float* HWY_RESTRICT matrix, int dim,
                             float* HWY_RESTRICT z) {
  const hn::CappedTag<float, 16> f32;
  const int lanes = static_cast<int>(hn::Lanes(f32));
  for (int j = 0; j < dim; j += lanes) {
    hn::Vec<decltype(f32)> sum[kTokens];
    KVTIDE_UNROLL
    for (int t = 0; t < kTokens; t++) sum[t] = hn::Zero(f32);
    for (int i = 0; i < dim; i++) {
      const auto row = hn::LoadU(f32, matrix + i * dim + j);
      KVTIDE_UNROLL
      for (int t = 0; t < kTokens; t++) sum[t] = hn::Add(hn::Mul(hn::Set(f32, x[t * dim + i]), row), sum[t]);
    }
    KVTIDE_UNROLL
    for (int t = 0; t < kTokens; t++) hn::StoreU(sum[t], f32, z + t * dim + j);
  }
}

// Byte b of `bits`: bit b of the codes of 8 coefficients.
template <int kWidth>
HWY_INLINE void CodeGroup(const float* z, float to_level, uint8_t* HWY_RESTRICT bits) {
  const hn::CappedTag<float, kTideGroup> f32;
  const hn::Rebind<int32_t, decltype(f32)> i32;
  constexpr int kHalf = 1 << (kWidth - 1), kStep = static_cast<int>(hn::MaxLanes(f32));
  uint8_t bytes[kWidth] = {};
  KVTIDE_UNROLL
  for (int at = 0; at < kTideGroup; at += kStep) {
    const auto v = hn::Mul(hn::LoadU(f32, z + at), hn::Set(f32, to_level));
    const auto magnitude = hn::Abs(v);
    auto above = hn::Zero(i32);
    KVTIDE_UNROLL
    for (int m = 0; m + 1 < kHalf; m++) {
      const float midpoint = 0.5f * static_cast<float>(TidePositive(kWidth, m) + TidePositive(kWidth, m + 1));
      // A mask is -1 where it is true.
      above = hn::Sub(above,
                      hn::VecFromMask(i32, hn::RebindMask(i32, hn::Gt(magnitude, hn::Set(f32, midpoint)))));
    }
    const auto positive = hn::RebindMask(i32, hn::Gt(v, hn::Zero(f32)));
    const auto code = hn::IfThenElse(positive, hn::Add(hn::Set(i32, kHalf), above),
                                     hn::Sub(hn::Set(i32, kHalf - 1), above));
    KVTIDE_UNROLL
    for (int b = 0; b < kWidth; b++) {
      uint8_t lanes[8] = {};
      hn::StoreMaskBits(i32, hn::TestBit(code, hn::Set(i32, 1 << b)), lanes);
      bytes[b] = static_cast<uint8_t>(bytes[b] | lanes[0] << at);
    }
  }
  KVTIDE_UNROLL
  for (int b = 0; b < kWidth; b++) bits[b * kTideUnitBytes] = bytes[b];
}

HWY_INLINE void CodeGroupOfAnyWidth(int width, const float* z, float gain, uint8_t* bits) {
  const float to_level = TideSigma(width) / gain;
  switch (width) {
    case 0:
      return;
    case 1:
      return CodeGroup<1>(z, to_level, bits);
    case 2:
      return CodeGroup<2>(z, to_level, bits);
    case 3:
      return CodeGroup<3>(z, to_level, bits);
    case 4:
      return CodeGroup<4>(z, to_level, bits);
    case 5:
      return CodeGroup<5>(z, to_level, bits);
    default:
      return CodeGroup<6>(z, to_level, bits);
  }
}

HWY_NOINLINE inline void EncodeTide(CacheType type, const HalfLayout& layout, const HeadProfile& head,
                                    int64_t position, const float* rows, int tokens, std::byte* half) {
  constexpr int kTokens = 4;
  const int dim = layout.head_dim;
  const KeyRebuild keys = MakeKeyRebuild(type, head);
  const uint8_t* widths = keys.widths;
  std::memset(half, 0, layout.bytes);
  auto* gains = reinterpret_cast<uint8_t*>(half + layout.code_bytes);
  alignas(64) float x[kTokens * kMaxTideDim], z[kTokens * kMaxTideDim];
  for (int first = 0; first < tokens; first += kTokens) {
    const int count = std::min(kTokens, tokens - first);
    for (int t = 0; t < kTokens; t++)
      std::memcpy(x + t * dim, rows + (first + std::min(t, count - 1)) * dim,
                  static_cast<size_t>(dim) * sizeof(float));
    TurnBackRows(keys, position, first, count, x);
    for (int t = 0; t < kTokens; t++)
      for (int i = 0; i < dim; i++) x[t * dim + i] -= keys.centre[i];
    MultiplyRows<kTokens>(x, head.transform.data(), dim, z);
    for (int t = 0; t < count; t++) {
      const float* own = z + t * dim;
      gains[first + t] = TideGainByte(own, widths, dim);
      const float gain = TideGain(gains[first + t]);
      auto* units = reinterpret_cast<uint8_t*>(half);
      for (int g = 0; g < dim / kTideGroup; g++) {
        CodeGroupOfAnyWidth(widths[g], own + g * kTideGroup, gain, units + TideByte(first + t, g));
        units += widths[g] * kTideUnitBytes;
      }
    }
  }
}

HWY_NOINLINE inline void DecodeTide(CacheType type, const HalfLayout& layout, const HeadProfile& head,
                                    int64_t position, const std::byte* half, float* rows) {
  const TagF32 f32;
  const int dim = layout.head_dim;
  const KeyRebuild keys = MakeKeyRebuild(type, head);
  const uint8_t* widths = keys.widths;
  const auto* bytes = reinterpret_cast<const uint8_t*>(half);
  const HalfView view{&CodeTableOf(type),        layout.stored_dim, layout.groups, bytes,
                      bytes + layout.code_bytes, nullptr,           &keys,         position};
  const auto tiles = hwy::AllocateAligned<float>(static_cast<size_t>(2 * layout.stored_dim * kBlockTokens));
  float *const tile = tiles.get(), *const out = tile + layout.stored_dim * kBlockTokens;
  LoadCoefficients(view, tile);
  for (int j = 0; j < dim; j++) {
    const VecF32 sigma = hn::Set(f32, TideSigma(widths[j / kTideGroup]));
    for (int t = 0; t < kBlockTokens; t += kLanes) {
      float* at = tile + j * kBlockTokens + t;
      hn::Store(hn::Div(hn::Load(f32, at), sigma), f32, at);
    }
  }
  for (int i = 0; i < dim; i++) {
    const float* inverse = head.inverse.data() + i * dim;
    const VecF32 centre = hn::Set(f32, keys.centre[i]);
    VecF32 sum[kPageVectors];
    KVTIDE_UNROLL
    for (int p = 0; p < kPageVectors; p++) sum[p] = hn::Zero(f32);
    for (int j = 0; j < dim; j++) {
      const VecF32 factor = hn::Set(f32, inverse[j]);
      KVTIDE_UNROLL
      for (int p = 0; p < kPageVectors; p++)
        sum[p] = hn::Add(hn::Mul(hn::Load(f32, tile + j * kBlockTokens + p * kLanes), factor), sum[p]);
    }
    KVTIDE_UNROLL
    for (int p = 0; p < kPageVectors; p++)
      hn::Store(hn::Add(sum[p], centre), f32, out + i * kBlockTokens + p * kLanes);
  }
  TurnKeyTile(keys, position, out);
  for (int t = 0; t < kBlockTokens; t++)
    for (int i = 0; i < dim; i++) rows[t * dim + i] = out[i * kBlockTokens + TokenPosition(t)];
}

// As TurnTideQuery, within rounding.
HWY_NOINLINE inline float TurnQuery(CacheType type, const HeadProfile& head, int stored_dim, float* query) {
  const KeyRebuild keys = MakeKeyRebuild(type, head);
  alignas(64) float turned[kMaxTideDim];
  MultiplyRows<1>(query, keys.inverse, keys.dim, turned);
  float bias = 0;
  for (int i = 0; i < keys.dim; i++) bias += query[i] * keys.centre[i];
  std::fill_n(query, stored_dim, 0.0f);
  for (int j = 0; j < CodedCoefficients(keys); j++)
    if (const int width = keys.widths[j / kTideGroup]; width > 0) query[j] = turned[j] / TideSigma(width);
  return bias;
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
