// LevelDots: units of codes times 16-bit words of several rows, summed in 32-bit lanes, exactly. The heart of
// attention of few rows, for K (words are queries) and V (words are weights) alike. Included once for each
// instruction set.
//
// Levels of 4 bits are looked up kOffset too large on AVX2, so that they are never negative: a vector of
// bytes becomes two of words by a mask and a shift, one instruction less than by sign extension. Sums begin
// with -kOffset times the sum of the row's words instead of zero.
#if defined(KVTIDE_KERNELS_CPU_SIMD_LEVEL_DOTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_LEVEL_DOTS_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_LEVEL_DOTS_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_LEVEL_DOTS_INL_H_
#endif

#include "kernels/cpu/simd_unpack-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// Vectors of units that are worked on together: as many as leave the sums in registers (32 of 512 bits, 16 of
// 256).
constexpr int VectorsFor(int rows) {
  return kWide ? (rows == 8 ? 2 : 4) : (rows == 1 ? 4 : rows == 8 ? 1 : 2);
}

// Keeps the order of what is computed as written. GCC would look up all codes before it uses any, and add the
// products of several pairs to each other before it adds them to the sums: more values than AVX2 has
// registers.
HWY_INLINE void KeepOrder(VecI32& sum) {
#if HWY_TARGET == HWY_AVX2
  asm volatile("" : "+x"(sum.raw));
#else
  (void)sum;
#endif
}
HWY_INLINE void KeepOrder(const uint8_t*& address) {
#if HWY_TARGET == HWY_AVX2
  asm volatile("" : "+r"(address));
#else
  (void)address;
#endif
}

// Offset of a quad in a plane of kBits, 4 or 8.
template <int kBits>
HWY_INLINE constexpr size_t QuadOffset(int quad) {
  static_assert(kBits == 4 || kBits == 8);
  return static_cast<size_t>(quad) * 128 * kBits;
}

template <int kBits>
class LevelDots {
  static constexpr bool kOffsetBytes = !kWide && kBits == 4;

 public:
  static constexpr int32_t kOffset = kOffsetBytes ? 128 : 0;

#if HWY_TARGET == HWY_AVX2
  HWY_INLINE explicit LevelDots(const CodeTable& table) : unpack_(table) {
    levels_ =
        hn::Xor(hn::LoadDup128(TagU8(), reinterpret_cast<const uint8_t*>(table.low)), hn::Set(TagU8(), 0x80));
  }
#else
  HWY_INLINE explicit LevelDots(const CodeTable& table) : unpack_(table) {}
#endif

  // Adds the units at at[v] of chunk-wise planes (see Unpacker::Load) to sums[v]. word(pair, row, vector):
  // the two 16-bit integers that meet the levels of a pair.
  template <bool kOdd, int kVectors, int kRows, class WordOf>
  HWY_INLINE void Add(const uint8_t* (&at)[kVectors], const WordOf& word,
                      VecI32 (&sums)[kVectors][kRows]) const {
    if constexpr (kOffsetBytes) {
      AddNibbles<0>(at, word, sums);
      KVTIDE_UNROLL
      for (int v = 0; v < kVectors; v++) KeepOrder(at[v]);
      AddNibbles<1>(at, word, sums);
      return;
    }
    Units units[kVectors];
    // GCC spills when this is a loop.
    const auto load = [&](auto index) HWY_ATTR {
      constexpr int kVector = decltype(index)::value;
      if constexpr (kVector < kVectors) units[kVector] = unpack_.template Load<0, kOdd>(at[kVector], 0);
    };
    load(std::integral_constant<int, 0>());
    load(std::integral_constant<int, 1>());
    load(std::integral_constant<int, 2>());
    load(std::integral_constant<int, 3>());
    const auto pair = [&](auto index) HWY_ATTR {
      constexpr int kPair = decltype(index)::value;
      VecI16 levels[kVectors];
      KVTIDE_UNROLL
      for (int v = 0; v < kVectors; v++) levels[v] = unpack_.template Pair<kPair>(units[v]);
      AddPair<kPair>(levels, word, sums);
    };
    pair(std::integral_constant<int, 0>());
    pair(std::integral_constant<int, 1>());
    pair(std::integral_constant<int, 2>());
    pair(std::integral_constant<int, 3>());
  }

 private:
  // The even (0) or odd (1) codes of every unit.
  template <int kOddCodes, int kVectors, int kRows, class WordOf>
  HWY_INLINE void AddNibbles(const uint8_t* const (&at)[kVectors], const WordOf& word,
                             VecI32 (&sums)[kVectors][kRows]) const {
#if HWY_TARGET == HWY_AVX2
    const hn::Repartition<uint16_t, TagU32> u16;
    const VecU32 nibble = hn::Set(TagU32(), 0x0f0f0f0fu);
    hn::Vec<decltype(u16)> bytes[kVectors];
    VecI16 levels[kVectors];
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) {
      const VecU32 codes = LoadChunk(at[v], 0);
      const VecU32 index = hn::And(kOddCodes ? hn::ShiftRight<4>(codes) : codes, nibble);
      bytes[v] = hn::BitCast(u16, hn::TableLookupBytes(levels_, hn::BitCast(TagU8(), index)));
      levels[v] = hn::BitCast(TagI16(), hn::And(bytes[v], hn::Set(u16, 0x00ff)));
    }
    AddPair<kOddCodes>(levels, word, sums);
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) levels[v] = hn::BitCast(TagI16(), hn::ShiftRight<8>(bytes[v]));
    AddPair<kOddCodes + 2>(levels, word, sums);
#else
    (void)at, (void)word, (void)sums;
#endif
  }

  template <int kPair, int kVectors, int kRows, class WordOf>
  static HWY_INLINE void AddPair(const VecI16 (&levels)[kVectors], const WordOf& word,
                                 VecI32 (&sums)[kVectors][kRows]) {
    KVTIDE_UNROLL
    for (int r = 0; r < kRows; r++) {
      KVTIDE_UNROLL
      for (int v = 0; v < kVectors; v++) {
        const VecI16 words = hn::BitCast(TagI16(), hn::Set(TagI32(), word(kPair, r, v)));
        sums[v][r] = AddDots(sums[v][r], levels[v], words);
        KeepOrder(sums[v][r]);
      }
    }
  }

  Unpacker<kBits> unpack_;
#if HWY_TARGET == HWY_AVX2
  hn::Vec<TagU8> levels_;
#endif
};

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
