// From coded halves of a page to f32 tiles, in the frame in which they are stored: scale times unit times
// level, the arithmetic of the definition (page_codec.h). Included once for each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_DECODE_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_DECODE_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_DECODE_INL_H_
#endif

#include "kernels/cpu/page/simd_page-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// Tokens lie at positions; dims of coded V at positions too (see code_table.h).

// Levels of the pair kPair of a vector of units, as f32.
template <int kBits, int kPair>
HWY_INLINE void PairLevels(const Unpacker<kBits>& unpack, const Units& units, VecF32& first, VecF32& second) {
  const VecI32 pair = hn::BitCast(TagI32(), unpack.template Pair<kPair>(units));
  first = hn::ConvertTo(TagF32(), hn::ShiftRight<16>(hn::ShiftLeft<16>(pair)));
  second = hn::ConvertTo(TagF32(), hn::ShiftRight<16>(pair));
}

template <int kBits>
HWY_INLINE void AllLevels(const Unpacker<kBits>& unpack, const Units& units, VecF32 (&levels)[8]) {
  PairLevels<kBits, 0>(unpack, units, levels[PairFirst(kBits, 0)], levels[PairSecond(kBits, 0)]);
  PairLevels<kBits, 1>(unpack, units, levels[PairFirst(kBits, 1)], levels[PairSecond(kBits, 1)]);
  PairLevels<kBits, 2>(unpack, units, levels[PairFirst(kBits, 2)], levels[PairSecond(kBits, 2)]);
  PairLevels<kBits, 3>(unpack, units, levels[PairFirst(kBits, 3)], levels[PairSecond(kBits, 3)]);
}

// All vectors of one quad, handed to take(column, vector of the column, levels).
template <int kBits, int kPhase, class Take>
HWY_INLINE void QuadLevels(const Unpacker<kBits>& unpack, const uint8_t* codes, int quad, const Take& take) {
  for (int column = 0; column < 4; column++)
    for (int sub = 0; sub < kQuadVectors; sub++) {
      const uint8_t* at = codes + ColumnOffset(column, sub);
      VecF32 levels[8];
      if (column % 2 == 0) {
        AllLevels<kBits>(unpack, unpack.template Load<kPhase, false>(at, quad), levels);
      } else {
        AllLevels<kBits>(unpack, unpack.template Load<kPhase, true>(at, quad), levels);
      }
      take(column, sub, levels);
    }
}

template <int kBits, class Take>
HWY_INLINE void AnyQuadLevels(const Unpacker<kBits>& unpack, const uint8_t* codes, int quad,
                              const Take& take) {
  constexpr int kPhases = Unpacker<kBits>::kPhases;
  switch (quad % kPhases) {
    case 0:
      return QuadLevels<kBits, 0>(unpack, codes, quad, take);
    case 1:
      return QuadLevels < kBits, kPhases >= 2 ? 1 : 0 > (unpack, codes, quad, take);
    case 2:
      return QuadLevels < kBits, kPhases == 4 ? 2 : 0 > (unpack, codes, quad, take);
    default:
      return QuadLevels < kBits, kPhases == 4 ? 3 : 0 > (unpack, codes, quad, take);
  }
}

struct TakeKeys {
  const float* scales;  // of the group, at token positions
  float* tile;          // [dim][64]
  int half, dim;        // the quad's tokens and first dim
  HWY_INLINE void operator()(int column, int sub, const VecF32 (&levels)[8]) const {
    const int at = 32 * half + sub * kLanes;
    const VecF32 scale = hn::Load(TagF32(), scales + at);
    KVTIDE_UNROLL
    for (int e = 0; e < 8; e++)
      hn::Store(hn::Mul(levels[e], scale), TagF32(), tile + (dim + 8 * column + e) * kBlockTokens + at);
  }
};

struct TakeValues {
  const float* scales;  // of the group, at token positions
  float* tile;          // [64][dims]
  int half, dim, dims;
  HWY_INLINE void operator()(int column, int sub, const VecF32 (&levels)[8]) const {
    KVTIDE_UNROLL
    for (int e = 0; e < 8; e++) {
      const int position = 32 * half + 8 * column + e % 2 * 4 + e / 2;
      const VecF32 scale = hn::Set(TagF32(), scales[position]);
      hn::Store(hn::Mul(levels[e], scale), TagF32(), tile + position * dims + dim + sub * kLanes);
    }
  }
};

template <int kBits>
HWY_NOINLINE void DecodeKeys(const HalfView& k, float* HWY_RESTRICT tile) {
  const Unpacker<kBits> unpack(*k.table);
  const int quads = k.dim / 32, step = k.table->group / 32;
  alignas(64) float scales[kBlockTokens];
  for (int quad = 0; quad < quads; quad++) {
    if (quad % step == 0) LoadScaledScales(k, quad / step, scales);
    for (int half = 0; half < 2; half++)
      AnyQuadLevels(unpack, k.codes, half * quads + quad, TakeKeys{scales, tile, half, 32 * quad});
  }
}

template <int kBits>
HWY_NOINLINE void DecodeValues(const HalfView& v, float* HWY_RESTRICT tile) {
  const Unpacker<kBits> unpack(*v.table);
  const int quads = v.dim / 32, step = v.table->group / 32;
  alignas(64) float scales[kBlockTokens];
  for (int quad = 0; quad < quads; quad++) {
    if (quad % step == 0) LoadScaledScales(v, quad / step, scales);
    for (int half = 0; half < 2; half++)
      AnyQuadLevels(unpack, v.codes, 2 * quad + half, TakeValues{scales, tile, half, 32 * quad, v.dim});
  }
}

// Any coded type but the rebuilt ones. `tile` has room for [dim][64] (keys) or [64][dim] (values).
inline void DecodeCodedKeys(const HalfView& k, float* tile) {
  switch (k.table->bits) {
    case 2:
      return DecodeKeys<2>(k, tile);
    case 3:
      return DecodeKeys<3>(k, tile);
    case 4:
      return DecodeKeys<4>(k, tile);
    case 5:
      return DecodeKeys<5>(k, tile);
    default:
      return DecodeKeys<8>(k, tile);
  }
}
inline void DecodeCodedValues(const HalfView& v, float* tile) {
  switch (v.table->bits) {
    case 2:
      return DecodeValues<2>(v, tile);
    case 3:
      return DecodeValues<3>(v, tile);
    case 4:
      return DecodeValues<4>(v, tile);
    case 5:
      return DecodeValues<5>(v, tile);
    default:
      return DecodeValues<8>(v, tile);
  }
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
