// From the words of a code plane to levels in vector lanes: a lane of 32 bits holds the 8 codes of one unit,
// and comes out as four pairs of 16-bit levels (code_table.h says which codes make a pair). Included once for
// each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_UNPACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_UNPACK_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_UNPACK_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_UNPACK_INL_H_
#endif

#include "kernels/cpu/page/simd_lanes-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// Offset of the slots of vector `sub` of column c inside a chunk of 512 bytes.
HWY_INLINE constexpr int ColumnOffset(int c, int sub) {
  constexpr int kSlots = kLanes / 4;  // of 16 bytes, one of them or more in a vector
  return (8 * c + kSlots * (sub ^ 2 * c / kSlots)) * 16;
}

// The XOR in the slot order swaps the halves of a 512-bit vector in odd columns.
template <bool kOdd>
HWY_INLINE VecU32 InOrder(VecU32 v) {
  if constexpr (kWide && kOdd) {
    return hn::ConcatLowerUpper(TagU32(), v, v);
  } else {
    return v;
  }
}

// Offset of a quad in a plane of kBits, 4 or 8.
template <int kBits>
HWY_INLINE constexpr size_t QuadOffset(int quad) {
  static_assert(kBits == 4 || kBits == 8);
  return static_cast<size_t>(quad) * 128 * kBits;
}

HWY_INLINE VecU32 LoadChunk(const uint8_t* p, int chunk) {
  return hn::Load(TagU32(), reinterpret_cast<const uint32_t*>(p + static_cast<size_t>(chunk) * 512));
}
template <int kBytes>
HWY_INLINE VecU32 Join(VecU32 high, VecU32 low) {
  return hn::BitCast(TagU32(), hn::CombineShiftRightBytes<kBytes>(TagU8(), hn::BitCast(TagU8(), high),
                                                                  hn::BitCast(TagU8(), low)));
}
HWY_INLINE VecU32 PerBlock(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  alignas(16) const uint32_t words[4] = {a, b, c, d};
  return hn::LoadDup128(TagU32(), words);
}

// Sign-extended low or high halves of 16-bit lanes.
HWY_INLINE VecI16 LowBytes(VecI8 v) { return hn::ShiftRight<8>(hn::ShiftLeft<8>(hn::BitCast(TagI16(), v))); }
HWY_INLINE VecI16 HighBytes(VecI8 v) { return hn::ShiftRight<8>(hn::BitCast(TagI16(), v)); }

// Whether levels are looked up as words, 32 of which are a table of 512 bits, or as bytes.
#undef KVTIDE_WORD_TABLES
#define KVTIDE_WORD_TABLES (HWY_TARGET == HWY_AVX3_DL)

// One vector of units, ready to give its level pairs. a: the codes as nibbles (word tables) or the levels of
// the even codes as bytes (byte tables, and 8 bits: codes 0-3); b: fifth bits, or levels of the odd codes (8
// bits: codes 4-7).
struct Units {
  VecU32 a, b;
  // Constructors that the compiler makes belong to no instruction set.
  HWY_INLINE Units() {}
  HWY_INLINE Units(VecU32 first, VecU32 second) : a(first), b(second) {}
};

template <int kBits>
class Unpacker {
 public:
  // Number of quads after which the cut of words into slots repeats.
  static constexpr int kPhases = kBits == 4 || kBits == 8 ? 1 : kBits == 2 ? 2 : 4;

  HWY_INLINE explicit Unpacker(const CodeTable& table) {
#if !KVTIDE_WORD_TABLES
    low_ = hn::LoadDup128(TagI8(), table.bytes);
    high_ = hn::LoadDup128(TagI8(), table.bytes + 16);
#else
    words_ = hn::Load(TagI16(), table.words);
#endif
  }

  // `plane` points at ColumnOffset(c, sub) of the plane, kOdd = c & 1, kPhase = quad % kPhases.
  template <int kPhase, bool kOdd>
  HWY_INLINE Units Load(const uint8_t* plane, int quad) const {
    Units units;
    if constexpr (kBits == 8) {
      const VecU32 a = LoadChunk(plane, 2 * quad), b = LoadChunk(plane, 2 * quad + 1);
      return {InOrder<kOdd>(EveryOther<false>(a, b)), InOrder<kOdd>(EveryOther<true>(a, b))};
    } else if constexpr (kBits == 5) {
      units = LoadFives<kPhase>(plane, quad);
      units = {InOrder<kOdd>(units.a), InOrder<kOdd>(units.b)};
    } else if constexpr (kBits == 4) {
      units.a = InOrder<kOdd>(LoadChunk(plane, quad));
    } else {
      units.a = InOrder<kOdd>(LoadNibbles<kPhase>(plane, quad));
    }
#if !KVTIDE_WORD_TABLES
    return LookUp(units);
#else
    return units;
#endif
  }

  // 5 bits: the units of a quad as nibbles, and the fifth bit of code e in bit 4e of b, whose other bits are
  // undefined.
  template <int kPhase>
  static HWY_INLINE Units LoadFives(const uint8_t* plane, int quad) {
    const int chunk = quad / 4 * 5 + kPhase;  // words 5 * quad and the next four
    const VecU32 a = LoadChunk(plane, chunk), b = LoadChunk(plane, chunk + 1);
    Units units;
    if constexpr (kPhase == 0) {
      units.a = a;
    } else {
      units.a = Join<4 * kPhase>(b, a);
    }
    units.b = hn::Shr(ShuffleBlock<kPhase * 0x55>(b), PerBlock(0, 1, 2, 3));
    return units;
  }

  // 2 and 3 bits: the units of a quad as nibbles, as a plane of 4-bit codes holds them; the bits above a code
  // are undefined.
  template <int kPhase>
  static HWY_INLINE VecU32 LoadNibbles(const uint8_t* plane, int quad) {
    if constexpr (kBits == 3) {
      const int chunk = quad / 4 * 3;
      VecU32 w;
      if constexpr (kPhase == 0) w = LoadChunk(plane, chunk);
      if constexpr (kPhase == 1) w = Join<12>(LoadChunk(plane, chunk + 1), LoadChunk(plane, chunk));
      if constexpr (kPhase == 2) w = Join<8>(LoadChunk(plane, chunk + 2), LoadChunk(plane, chunk + 1));
      if constexpr (kPhase == 3) w = ShuffleBlock<0x39>(LoadChunk(plane, chunk + 2));
      // The fourth unit: bit 3 of every nibble of the three words.
      const VecU32 top = hn::And(w, hn::Set(TagU32(), 0x88888888u));
      const VecU32 spread = hn::Shr(top, PerBlock(3, 2, 1, 32));
      const VecU32 two = hn::Or(spread, ShuffleBlock<0x4E>(spread));
      return OrIntoFourth(w, two, ShuffleBlock<0xB1>(two));
    } else {
      static_assert(kBits == 2);
      const VecU32 w = ShuffleBlock < kPhase == 0 ? 0x50 : 0xFA > (LoadChunk(plane, quad / 2));
      return hn::Shr(w, PerBlock(0, 2, 0, 2));
    }
  }

  template <int kPair>
  HWY_INLINE VecI16 Pair(const Units& units) const {
    if constexpr (kBits == 8) {
      const VecI8 v = hn::BitCast(TagI8(), kPair < 2 ? units.a : units.b);
      return kPair % 2 == 0 ? LowBytes(v) : HighBytes(v);
    }
#if !KVTIDE_WORD_TABLES
    const VecI8 v = hn::BitCast(TagI8(), kPair % 2 == 0 ? units.a : units.b);
    return kPair < 2 ? LowBytes(v) : HighBytes(v);
#else
    const hn::Repartition<uint16_t, TagU32> u16;
    auto index = hn::ShiftRight<4 * kPair>(hn::BitCast(u16, units.a));
    if constexpr (kBits == 5) {
      const auto fifth = hn::BitCast(u16, units.b);
      const auto at4 = kPair == 0                    ? hn::ShiftLeft<4>(fifth)
                       : hn::ShiftRight < kPair == 0 ? 0
                                                     : 4 * kPair - 4 > (fifth);
      const auto mask = hn::Set(u16, 16);
      index = hn::Or(hn::And(at4, mask), hn::AndNot(mask, index));
    }
    return VecI16{_mm512_permutexvar_epi16(index.raw, words_.raw)};
#endif
  }

 private:
#if !KVTIDE_WORD_TABLES
  HWY_INLINE Units LookUp(const Units& units) const {
    const VecU32 nibble = hn::Set(TagU32(), 0x0f0f0f0fu);
    const VecI8 even = hn::BitCast(TagI8(), hn::And(units.a, nibble));
    const VecI8 odd = hn::BitCast(TagI8(), hn::And(hn::ShiftRight<4>(units.a), nibble));
    VecI8 a = hn::TableLookupBytes(low_, even), b = hn::TableLookupBytes(low_, odd);
    if constexpr (kBits == 5) {
      const VecU32 one = hn::Set(TagU32(), 0x01010101u);
      const VecI8 zero = hn::Zero(TagI8());
      const VecI8 even_mask = hn::Sub(zero, hn::BitCast(TagI8(), hn::And(units.b, one)));
      const VecI8 odd_mask = hn::Sub(zero, hn::BitCast(TagI8(), hn::And(hn::ShiftRight<4>(units.b), one)));
      a = hn::Or(hn::And(even_mask, hn::TableLookupBytes(high_, even)), hn::AndNot(even_mask, a));
      b = hn::Or(hn::And(odd_mask, hn::TableLookupBytes(high_, odd)), hn::AndNot(odd_mask, b));
    }
    return {hn::BitCast(TagU32(), a), hn::BitCast(TagU32(), b)};
  }
  VecI8 low_, high_;
#else
  VecI16 words_;
#endif
};

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
