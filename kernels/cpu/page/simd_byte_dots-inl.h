// LevelDots of NEON (simd_level_dots-inl.h): levels of 8 bits times the two bytes of the words, four of them
// to a lane (sdot). Levels need no widening, and a word costs two products of a byte. Included once for each
// instruction set.
//
// The first four codes of a unit are the even ones, of 8 bits those from 0 to 3. A word is 256 times its high
// byte plus its low byte, both signed, so the high one is rounded.
#if defined(KVTIDE_KERNELS_CPU_SIMD_BYTE_DOTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_BYTE_DOTS_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_BYTE_DOTS_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_BYTE_DOTS_INL_H_
#endif

#include "kernels/cpu/page/simd_unpack-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET && HWY_TARGET == HWY_NEON

struct LevelSum {
  int32x4_t high, low;  // of the products with high and low bytes
};
HWY_INLINE LevelSum StartSum(int32_t start) { return {vdupq_n_s32(0), vdupq_n_s32(start)}; }
HWY_INLINE VecI32 Total(const LevelSum& sum) { return VecI32(vaddq_s32(vshlq_n_s32(sum.high, 8), sum.low)); }

// 16 of 32 registers for sums at most.
constexpr int VectorsFor(int rows) { return rows <= 2 ? 4 : rows == 8 ? 1 : 2; }

constexpr float kLargestWord = 127 * 256 + 127;

// The words of a row for a unit: 8 high bytes, 8 low bytes, each those of the first four codes and of the
// others.
HWY_INLINE void StoreBytes(int16x8_t words, int32_t* HWY_RESTRICT out) {
  vst1q_s8(reinterpret_cast<int8_t*>(out), vcombine_s8(vrshrn_n_s16(words, 8), vmovn_s16(words)));
}

// Words of K: [row][4].
template <int kRows>
HWY_INLINE constexpr int UnitWord(int part, int row) {
  return row * 4 + part;
}
template <int kRows>
HWY_INLINE void PutWords(int bits, const int32_t* words, int row, int32_t* HWY_RESTRICT unit) {
  const int16x8_t in_order = vcombine_s16(vmovn_s32(vld1q_s32(words)), vmovn_s32(vld1q_s32(words + 4)));
  const int16x8_t evens_first = vcombine_s16(vget_low_s16(vuzp1q_s16(in_order, in_order)),
                                             vget_low_s16(vuzp2q_s16(in_order, in_order)));
  StoreBytes(bits == 8 ? in_order : evens_first, unit + UnitWord<kRows>(0, row));
}

// Words of V: positions of an octet are tokens 0,2,4,6 and 1,3,5,7, the order of the codes of a unit but for
// 8 bits.
constexpr int PackedWord(int octet, int part) { return octet * 4 + part; }
template <int kBits>
HWY_INLINE VecI16 PackWords(VecI32 a, VecI32 b) {
  const VecI16 packed = PackBlocks(a, b);
  if constexpr (kBits != 8) return packed;
  return VecI16(vzip1q_s16(packed.raw, vextq_s16(packed.raw, packed.raw, 4)));
}
HWY_INLINE void StorePacked(VecI16 words, int32_t* HWY_RESTRICT packed) { StoreBytes(words.raw, packed); }

template <int kBits>
class LevelDots {
 public:
  static constexpr int32_t kOffset = 0;

  HWY_INLINE explicit LevelDots(const CodeTable& table) : levels_(table.bytes) {}

  static HWY_INLINE VecI32 AddToStart(VecI32 start, VecI16) { return start; }

  // Adds the units of one quad and column at at[v] to sums[v]. word(0, row, vector): the words of a row for
  // them.
  template <bool kOdd, int kVectors, int kRows, class WordOf>
  HWY_INLINE void Add(const uint8_t* (&at)[kVectors], const WordOf& word,
                      LevelSum (&sums)[kVectors][kRows]) const {
    int8x16_t first[kVectors], second[kVectors];
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) Load(at[v], first[v], second[v]);
    KVTIDE_UNROLL
    for (int r = 0; r < kRows; r++) {
      KVTIDE_UNROLL
      for (int v = 0; v < kVectors; v++) {
        const int8x16_t words = vld1q_s8(reinterpret_cast<const int8_t*>(&word(0, r, v)));
        LevelSum& sum = sums[v][r];
        sum.high = vdotq_laneq_s32(sum.high, first[v], words, 0);
        sum.low = vdotq_laneq_s32(sum.low, first[v], words, 2);
        sum.high = vdotq_laneq_s32(sum.high, second[v], words, 1);
        sum.low = vdotq_laneq_s32(sum.low, second[v], words, 3);
        // As written: GCC would look up the codes of all columns before it uses any, and keep sums on the
        // stack.
        asm volatile("" : "+w"(sum.high), "+w"(sum.low));
      }
    }
  }

 private:
  HWY_INLINE void Load(const uint8_t* at, int8x16_t& first, int8x16_t& second) const {
    VecU32 codes = LoadChunk(at, 0);
    asm volatile("" : "+w"(codes.raw));
    if constexpr (kBits == 8) {
      const VecU32 more = LoadChunk(at, 1);
      first = vreinterpretq_s8_u32(EveryOther<false>(codes, more).raw);
      second = vreinterpretq_s8_u32(EveryOther<true>(codes, more).raw);
    } else {
      const uint8x16_t bytes = vreinterpretq_u8_u32(codes.raw);
      first = levels_.Of(VecI8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))))).raw;
      second = levels_.Of(VecI8(vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)))).raw;
    }
  }

  ByteTable<16> levels_;
};

#endif  // KVTIDE_VECTOR_TARGET and NEON
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
