// Keys of calibrated types as f32 tiles [dim][64] with tokens at positions: their coefficients, or the keys
// as they were, by inverse transform, mean and RoPE of their position. Included once for each instruction
// set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_REBUILD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_REBUILD_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_REBUILD_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_REBUILD_INL_H_
#endif

#include <algorithm>

#include "kernels/cpu/page/simd_decode-inl.h"
#include "kernels/cpu/page/simd_product-inl.h"
#include "kernels/cpu/page/simd_rope-inl.h"
#include "kernels/cpu/page/simd_tide-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// Memory for a tile that attention rebuilds keys in and for the tile; none where it rebuilds none.
inline hwy::AlignedFreeUniquePtr<float[]> AllocateScratch(const HalfView& k) {
  if (!k.rebuilt()) return {};
  return hwy::AllocateAligned<float>(static_cast<size_t>(2 * k.dim * kBlockTokens));
}

// Gain times level of all coefficients, [dim][64]; returns behind which none has bits.
HWY_NOINLINE inline int LoadCoefficients(const HalfView& k, float* HWY_RESTRICT tile) {
  HWY_ALIGN WidePlane plane;
  const KeyRebuild& keys = *k.rebuild;
  ExpandTide(keys.widths, k.codes, k.dim, plane);
  alignas(64) float gains[kBlockTokens];
  LoadGains(k.scales, gains);
  const Unpacker<8> unpack(*k.table);
  const int quads = k.dim / 32;
  for (int quad = 0; quad < quads; quad++)
    for (int half = 0; half < 2; half++)
      AnyQuadLevels(unpack, plane, half * quads + quad, TakeKeys{gains, tile, half, 32 * quad});
  return CodedCoefficients(keys);
}

// `scratch` and `tile` have room for [dim][64].
HWY_NOINLINE inline void RebuildKeys(const HalfView& k, float* HWY_RESTRICT scratch,
                                     float* HWY_RESTRICT tile) {
  const TagF32 f32;
  const KeyRebuild& keys = *k.rebuild;
  const int coded = LoadCoefficients(k, scratch);
  for (int j = 0; j < coded; j++) {
    const VecF32 unit = hn::Set(f32, 1.0f / TideSigma(keys.widths[j / kTideGroup]));
    for (int p = 0; p < kBlockTokens; p += kLanes) {
      float* const at = scratch + j * kBlockTokens + p;
      hn::Store(hn::Mul(hn::Load(f32, at), unit), f32, at);
    }
  }
  Product(keys.inverse, keys.dim, keys.dim, scratch, coded, kBlockTokens, nullptr, tile, kBlockTokens);
  for (int i = 0; i < keys.dim; i++) {
    const VecF32 centre = hn::Set(f32, keys.centre[i]);
    for (int p = 0; p < kBlockTokens; p += kLanes) {
      float* const at = tile + i * kBlockTokens + p;
      hn::Store(hn::Add(hn::Load(f32, at), centre), f32, at);
    }
  }
  std::fill_n(tile + keys.dim * kBlockTokens, (k.dim - keys.dim) * kBlockTokens, 0.0f);
  TurnKeyTile(keys, k.position, tile);
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
