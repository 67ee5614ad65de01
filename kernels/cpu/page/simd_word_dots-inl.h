// LevelDots of x86 (simd_level_dots-inl.h): levels of 16 bits times words of 16 bits, a pair to a lane.
// Included once for each instruction set.
//
// Levels of 4 bits are looked up kOffset too large on AVX2, so that they are never negative: a vector of
// bytes becomes two of words by a mask and a shift, one instruction less than by sign extension.
#if defined(KVTIDE_KERNELS_CPU_SIMD_WORD_DOTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_WORD_DOTS_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_WORD_DOTS_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_WORD_DOTS_INL_H_
#endif

#include "kernels/cpu/page/simd_unpack-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET && HWY_TARGET != HWY_NEON

using LevelSum = VecI32;
HWY_INLINE LevelSum StartSum(int32_t start) { return hn::Set(TagI32(), start); }
HWY_INLINE VecI32 Total(LevelSum sum) { return sum; }

// 32 registers of 512 bits or 16 of 256.
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

constexpr float kLargestWord = 32767;

// Words of K: an integer for each pair, [pair][row].
template <int kRows>
HWY_INLINE constexpr int UnitWord(int pair, int row) {
  return pair * kRows + row;
}
template <int kRows>
HWY_INLINE void PutWords(int bits, const int32_t* words, int row, int32_t* HWY_RESTRICT unit) {
  for (int pair = 0; pair < 4; pair++) {
    const auto first = static_cast<uint32_t>(words[PairFirst(bits, pair)]),
               second = static_cast<uint32_t>(words[PairSecond(bits, pair)]);
    unit[UnitWord<kRows>(pair, row)] = static_cast<int32_t>((first & 0xffffu) | second << 16);
  }
}

// Words of V: a block of four positions holds tokens 0,2,4,6 or 1,3,5,7 of an octet; it gives two integers,
// of positions (0,2) and (1,3), or (0,1) and (2,3) for 8-bit codes, whose pairs are cut so. Two vectors of
// positions are packed into one of words.
constexpr int PackedWord(int octet, int pair) {
  const int block = 2 * octet + pair % 2, blocks = kLanes / 4, vector = block / blocks;
  return vector / 2 * kLanes + block % blocks * 4 + vector % 2 * 2 + pair / 2;
}
template <int kBits>
HWY_INLINE VecI16 PackWords(VecI32 a, VecI32 b) {
  const VecI16 packed = PackBlocks(a, b);
  if constexpr (kBits == 8) return packed;
  // Positions 0,2,1,3 of each half of a 16-byte block.
  alignas(16) static constexpr uint8_t kOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  return hn::BitCast(TagI16(),
                     hn::TableLookupBytes(hn::BitCast(TagU8(), packed), hn::LoadDup128(TagU8(), kOrder)));
}
HWY_INLINE void StorePacked(VecI16 words, int32_t* HWY_RESTRICT packed) {
  hn::Store(hn::BitCast(TagI32(), words), TagI32(), packed);
}

template <int kBits>
class LevelDots {
 public:
  static constexpr int32_t kOffset = !kWide && kBits == 4 ? 128 : 0;

#if HWY_TARGET == HWY_AVX2
  HWY_INLINE explicit LevelDots(const CodeTable& table) {
    levels_ = hn::Xor(hn::LoadDup128(TagU8(), reinterpret_cast<const uint8_t*>(table.bytes)),
                      hn::Set(TagU8(), kOffset));
  }
#else
  HWY_INLINE explicit LevelDots(const CodeTable& table) : unpack_(table) {}
#endif

  // What the words of V add to where sums begin.
  static HWY_INLINE VecI32 AddToStart(VecI32 start, VecI16 words) {
    if constexpr (kOffset == 0) return start;
    return AddDots(start, words, hn::Set(TagI16(), static_cast<int16_t>(-kOffset)));
  }

  // Adds the units of one quad and column at at[v] (see Unpacker::Load) to sums[v]. word(pair, row, vector):
  // the two 16-bit integers that meet the levels of a pair.
  template <bool kOdd, int kVectors, int kRows, class WordOf>
  HWY_INLINE void Add(const uint8_t* (&at)[kVectors], const WordOf& word,
                      LevelSum (&sums)[kVectors][kRows]) const {
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
                                 LevelSum (&sums)[kVectors][kRows]) {
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
                          LevelSum (&sums)[kVectors][kRows]) const {
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
                            LevelSum (&sums)[kVectors][kRows]) const {
    VecI16 levels[kVectors];
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) levels[v] = unpack_.template Pair<kPair>(units[v]);
    AddPair<kPair>(levels, word, sums);
  }

  Unpacker<kBits> unpack_;
#endif
};

#endif  // KVTIDE_VECTOR_TARGET and x86
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
