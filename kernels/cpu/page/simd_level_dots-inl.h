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

#include "kernels/cpu/page/simd_unpack-inl.h"

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
 public:
  static constexpr int32_t kOffset = !kWide && kBits == 4 ? 128 : 0;

#if HWY_TARGET == HWY_AVX2
  HWY_INLINE explicit LevelDots(const CodeTable& table) {
    levels_ = hn::Xor(hn::LoadDup128(TagU8(), reinterpret_cast<const uint8_t*>(table.low)),
                      hn::Set(TagU8(), kOffset));
  }
#else
  HWY_INLINE explicit LevelDots(const CodeTable& table) : unpack_(table) {}
#endif

  // Adds the units of one quad and column at at[v] (see Unpacker::Load) to sums[v]. word(pair, row, vector):
  // the two 16-bit integers that meet the levels of a pair.
  template <bool kOdd, int kVectors, int kRows, class WordOf>
  HWY_INLINE void Add(const uint8_t* (&at)[kVectors], const WordOf& word,
                      VecI32 (&sums)[kVectors][kRows]) const {
#if HWY_TARGET == HWY_AVX2
    AddHalf<0>(at, word, sums);
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) KeepOrder(at[v]);
    AddHalf<1>(at, word, sums);
#else
    Units units[kVectors];
    // GCC spills when this is a loop. Functions, since Clang 14 gives templates of lambdas no target.
    LoadUnit<0, kOdd>(at, units);
    LoadUnit<1, kOdd>(at, units);
    LoadUnit<2, kOdd>(at, units);
    LoadUnit<3, kOdd>(at, units);
    AddPairOf<0>(units, word, sums);
    AddPairOf<1>(units, word, sums);
    AddPairOf<2>(units, word, sums);
    AddPairOf<3>(units, word, sums);
#endif
  }

 private:
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

#if HWY_TARGET == HWY_AVX2
  // Half of the codes of every unit: the even or the odd ones, of 8 bits the first or the last four.
  template <int kHalf, int kVectors, int kRows, class WordOf>
  HWY_INLINE void AddHalf(const uint8_t* const (&at)[kVectors], const WordOf& word,
                          VecI32 (&sums)[kVectors][kRows]) const {
    const hn::Repartition<uint16_t, TagU32> u16;
    VecI8 bytes[kVectors];
    VecI16 levels[kVectors];
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) {
      bytes[v] = LevelBytes<kHalf>(at[v]);
      levels[v] = kBits == 8
                      ? LowBytes(bytes[v])
                      : hn::BitCast(TagI16(), hn::And(hn::BitCast(u16, bytes[v]), hn::Set(u16, 0x00ff)));
    }
    AddPair<kBits == 8 ? 2 * kHalf : kHalf>(levels, word, sums);
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++)
      levels[v] = kBits == 8 ? HighBytes(bytes[v])
                             : hn::BitCast(TagI16(), hn::ShiftRight<8>(hn::BitCast(u16, bytes[v])));
    AddPair<kBits == 8 ? 2 * kHalf + 1 : kHalf + 2>(levels, word, sums);
  }

  template <int kHalf>
  HWY_INLINE VecI8 LevelBytes(const uint8_t* at) const {
    const VecU32 codes = LoadChunk(at, 0);
    if constexpr (kBits == 8) return hn::BitCast(TagI8(), EveryOther<kHalf == 1>(codes, LoadChunk(at, 1)));
    const VecU32 index =
        hn::And(kHalf == 0 ? codes : hn::ShiftRight<4>(codes), hn::Set(TagU32(), 0x0f0f0f0fu));
    return hn::BitCast(TagI8(), hn::TableLookupBytes(levels_, hn::BitCast(TagU8(), index)));
  }

  hn::Vec<TagU8> levels_;
#else
  template <int kVector, bool kOdd, int kVectors>
  HWY_INLINE void LoadUnit(const uint8_t* (&at)[kVectors], Units (&units)[kVectors]) const {
    if constexpr (kVector < kVectors) units[kVector] = unpack_.template Load<0, kOdd>(at[kVector], 0);
  }
  template <int kPair, int kVectors, int kRows, class WordOf>
  HWY_INLINE void AddPairOf(const Units (&units)[kVectors], const WordOf& word,
                            VecI32 (&sums)[kVectors][kRows]) const {
    VecI16 levels[kVectors];
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) levels[v] = unpack_.template Pair<kPair>(units[v]);
    AddPair<kPair>(levels, word, sums);
  }

  Unpacker<kBits> unpack_;
#endif
};

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
