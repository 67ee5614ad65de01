// The lanes of an instruction set's vectors, and what kernels do to them that Highway 1.0.3 has no name for,
// one version for each instruction set. Included once for each of them.
#if defined(KVTIDE_KERNELS_CPU_SIMD_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_LANES_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_LANES_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_LANES_INL_H_
#endif

#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/page/code_table.h"

// What Highway 1.0.3 does not name in its targets: avx512vnni in AVX3_DL, products of bytes in NEON.
#undef KVTIDE_BEFORE_NAMESPACE
#if HWY_TARGET == HWY_AVX3_DL
#define KVTIDE_BEFORE_NAMESPACE() HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512vnni") static_assert(true, "")
#elif HWY_TARGET == HWY_NEON && defined(HWY_TARGET_STR)
#define KVTIDE_BEFORE_NAMESPACE() HWY_PUSH_ATTRIBUTES("arch=armv8.2-a+crypto+dotprod") static_assert(true, "")
#else
#define KVTIDE_BEFORE_NAMESPACE() HWY_BEFORE_NAMESPACE()
#endif

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET
namespace hn = hwy::HWY_NAMESPACE;

using TagF32 = hn::ScalableTag<float>;
using TagI32 = hn::ScalableTag<int32_t>;
using TagU32 = hn::ScalableTag<uint32_t>;
using TagI16 = hn::ScalableTag<int16_t>;
using TagI8 = hn::ScalableTag<int8_t>;
using TagU8 = hn::ScalableTag<uint8_t>;
using TagF16 = hn::Rebind<hwy::float16_t, TagF32>;
using TagU16Half = hn::Rebind<uint16_t, TagF32>;
using VecF32 = hn::Vec<TagF32>;
using VecI32 = hn::Vec<TagI32>;
using VecU32 = hn::Vec<TagU32>;
using VecI16 = hn::Vec<TagI16>;
using VecI8 = hn::Vec<TagI8>;
using VecU8 = hn::Vec<TagU8>;

constexpr int kLanes = HWY_MAX_BYTES / 4;  // 32-bit lanes: 4, 8 or 16
constexpr int kQuadVectors = 32 / kLanes;  // vectors for one column c of a quad: 8 values of n times 4 units
constexpr int kPageVectors = 64 / kLanes;  // vectors for one value of each token of a page
constexpr bool kWide = kLanes == 16;       // a vector spans two chunks of an f16 row
constexpr bool kManyRegisters = HWY_TARGET != HWY_AVX2;  // 32, AVX2 16

#if HWY_TARGET != HWY_NEON  // both of x86

// The larger and the smaller of bound and x; NaN if x is, for the second operand is the result then.
template <class V>
HWY_INLINE V AtLeast(V bound, V x) {
  return hn::Max(bound, x);
}
template <class V>
HWY_INLINE V AtMost(V bound, V x) {
  return hn::Min(bound, x);
}
using LaneOrder = decltype(hn::SetTableIndices(TagF32(), static_cast<const int32_t*>(nullptr)));
// Puts values of tokens in order to positions (code_table.h), kVectors vectors at a time.
class TokenOrder {
 public:
  static constexpr int kVectors = 1;
  HWY_INLINE TokenOrder() : order_(Order()) {}
  HWY_INLINE void Store(const VecF32 (&tokens)[1], float* HWY_RESTRICT out) const {
    hn::Store(hn::TableLookupLanes(tokens[0], order_), TagF32(), out);
  }

 private:
  static HWY_INLINE LaneOrder Order() {
    alignas(64) int32_t index[kLanes];
    for (int i = 0; i < kLanes; i++) index[i] = TokenAtPosition(i);
    return hn::SetTableIndices(TagF32(), index);
  }
  LaneOrder order_;
};

#endif

#if HWY_TARGET == HWY_AVX2

// Words of each 16-byte block by two bits of the immediate each, as pshufd.
template <int kImmediate>
HWY_INLINE VecU32 ShuffleBlock(VecU32 v) {
  return VecU32{_mm256_shuffle_epi32(v.raw, kImmediate)};
}
// Words 0 and 2 (kOdd: 1 and 3) of each 16-byte block of a, then of b.
template <bool kOdd>
HWY_INLINE VecU32 EveryOther(VecU32 a, VecU32 b) {
  return VecU32{_mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(a.raw), _mm256_castsi256_ps(b.raw), kOdd ? 0xDD : 0x88))};
}
// Word 3 of each block is a | b, the others are those of `rest`.
HWY_INLINE VecU32 OrIntoFourth(VecU32 rest, VecU32 a, VecU32 b) {
  return VecU32{_mm256_blend_epi32(rest.raw, _mm256_or_si256(a.raw, b.raw), 0x88)};
}
// x of the lane whose index differs in bit kStride.
template <int kStride>
HWY_INLINE VecF32 Partner(VecF32 x) {
  if constexpr (kStride == 1) return hn::Shuffle2301(x);
  if constexpr (kStride == 2) return hn::Shuffle1032(x);
  return hn::ConcatLowerUpper(TagF32(), x, x);
}
// As NearestInt, which spends three instructions on numbers that fit no int32: here they must fit.
HWY_INLINE VecI32 NearestSmallInt(VecF32 x) { return VecI32{_mm256_cvtps_epi32(x.raw)}; }
// acc + the sum of the two products of each lane.
HWY_INLINE VecI32 AddDots(VecI32 acc, VecI16 a, VecI16 b) {
  VecI32 unused = hn::Zero(TagI32());
  return hn::ReorderWidenMulAccumulate(TagI32(), a, b, acc, unused);
}
// Both as 16 bits, saturated: in each 16-byte block four of a and then four of b.
HWY_INLINE VecI16 PackBlocks(VecI32 a, VecI32 b) { return VecI16{_mm256_packs_epi32(a.raw, b.raw)}; }
// Products of fractions of 32768, rounded.
HWY_INLINE VecI16 MulFractions(VecI16 a, VecI16 b) { return VecI16{_mm256_mulhrs_epi16(a.raw, b.raw)}; }
// The four sums over the lanes of each of four vectors, of which `sum` holds four partial ones in each block.
HWY_INLINE void StoreBlockSum(VecF32 sum, float* HWY_RESTRICT out) {
  _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(sum.raw), _mm256_extractf128_ps(sum.raw, 1)));
}
// Neighbouring chunks of 8 values exchanged, where a vector spans two.
HWY_INLINE VecF32 SwapChunks(VecF32 v) { return v; }
// `value` added to the bytes of `codes` whose bit of `bits` is set; they have none of its bits.
HWY_INLINE VecU8 AddWhereSet(VecU8 codes, const uint8_t* bits, uint8_t value) {
  const TagU8 u8;
  alignas(32) static constexpr uint8_t kByte[32] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                                    2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3};
  const auto bit = hn::BitCast(u8, hn::Set(hn::Repartition<uint64_t, TagU8>(), 0x8040201008040201u));
  uint32_t word;
  std::memcpy(&word, bits, sizeof word);
  const auto spread = hn::TableLookupBytes(hn::BitCast(u8, hn::Set(TagU32(), word)), hn::Load(u8, kByte));
  const auto set = hn::Eq(hn::And(spread, bit), bit);
  return hn::Or(codes, hn::IfThenElseZero(set, hn::Set(u8, value)));
}
// A table of 16, 32 or 64 bytes, aligned to its size; an index is smaller.
template <int kEntries>
class ByteTable {
 public:
  HWY_INLINE explicit ByteTable(const int8_t* table) {
    KVTIDE_UNROLL
    for (int i = 0; i < kParts; i++) parts_[i] = hn::LoadDup128(TagI8(), table + 16 * i);
  }
  HWY_INLINE VecI8 Of(VecI8 index) const {
    VecI8 found = hn::TableLookupBytes(parts_[0], index);  // which ignores bits 4 to 6
    KVTIDE_UNROLL
    for (int i = 1; i < kParts; i++)
      found = hn::IfThenElse(hn::Gt(index, hn::Set(TagI8(), static_cast<int8_t>(16 * i - 1))),
                             hn::TableLookupBytes(parts_[i], index), found);
    return found;
  }

 private:
  static constexpr int kParts = kEntries / 16;
  VecI8 parts_[kParts];
};

#elif HWY_TARGET == HWY_AVX3_DL

template <int kImmediate>
HWY_INLINE VecU32 ShuffleBlock(VecU32 v) {
  return VecU32{_mm512_shuffle_epi32(v.raw, static_cast<_MM_PERM_ENUM>(kImmediate))};
}
template <bool kOdd>
HWY_INLINE VecU32 EveryOther(VecU32 a, VecU32 b) {
  return VecU32{_mm512_castps_si512(
      _mm512_shuffle_ps(_mm512_castsi512_ps(a.raw), _mm512_castsi512_ps(b.raw), kOdd ? 0xDD : 0x88))};
}
HWY_INLINE VecU32 OrIntoFourth(VecU32 rest, VecU32 a, VecU32 b) {
  return VecU32{_mm512_mask_or_epi32(rest.raw, 0x8888, a.raw, b.raw)};
}
template <int kStride>
HWY_INLINE VecF32 Partner(VecF32 x) {
  if constexpr (kStride == 1) return hn::Shuffle2301(x);
  if constexpr (kStride == 2) return hn::Shuffle1032(x);
  return VecF32{_mm512_shuffle_f32x4(x.raw, x.raw, kStride == 4 ? 0xB1 : 0x4E)};
}
HWY_INLINE VecI32 NearestSmallInt(VecF32 x) { return VecI32{_mm512_cvtps_epi32(x.raw)}; }
HWY_INLINE VecI32 AddDots(VecI32 acc, VecI16 a, VecI16 b) {
  return VecI32{_mm512_dpwssd_epi32(acc.raw, a.raw, b.raw)};
}
HWY_INLINE VecI16 PackBlocks(VecI32 a, VecI32 b) { return VecI16{_mm512_packs_epi32(a.raw, b.raw)}; }
HWY_INLINE VecI16 MulFractions(VecI16 a, VecI16 b) { return VecI16{_mm512_mulhrs_epi16(a.raw, b.raw)}; }
HWY_INLINE void StoreBlockSum(VecF32 sum, float* HWY_RESTRICT out) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum.raw), _mm512_extractf32x8_ps(sum.raw, 1));
  _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
HWY_INLINE VecF32 SwapChunks(VecF32 v) { return VecF32{_mm512_shuffle_f32x4(v.raw, v.raw, 0x4E)}; }
HWY_INLINE VecU8 AddWhereSet(VecU8 codes, const uint8_t* bits, uint8_t value) {
  uint64_t word;
  std::memcpy(&word, bits, sizeof word);
  return VecU8{_mm512_mask_add_epi8(codes.raw, word, codes.raw, _mm512_set1_epi8(static_cast<char>(value)))};
}
template <int kEntries>
class ByteTable {
 public:
  HWY_INLINE explicit ByteTable(const int8_t* table) {
    if constexpr (kEntries == 16) bytes_ = hn::LoadDup128(TagI8(), table);
    if constexpr (kEntries == 32) {
      const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
      bytes_ = VecI8{_mm512_broadcast_i64x4(half)};
    }
    if constexpr (kEntries == 64) bytes_ = hn::Load(TagI8(), table);
  }
  HWY_INLINE VecI8 Of(VecI8 index) const { return VecI8{_mm512_permutexvar_epi8(index.raw, bytes_.raw)}; }

 private:
  VecI8 bytes_;
};

#else  // NEON

// Highway's Max and Min are those that leave a NaN out.
template <class V>
HWY_INLINE V AtLeast(V bound, V x) {
  return V(vmaxq_f32(bound.raw, x.raw));
}
template <class V>
HWY_INLINE V AtMost(V bound, V x) {
  return V(vminq_f32(bound.raw, x.raw));
}
class TokenOrder {
 public:
  static constexpr int kVectors = 2;
  HWY_INLINE void Store(const VecF32 (&tokens)[2], float* HWY_RESTRICT out) const {
    hn::Store(VecF32(vuzp1q_f32(tokens[0].raw, tokens[1].raw)), TagF32(), out);
    hn::Store(VecF32(vuzp2q_f32(tokens[0].raw, tokens[1].raw)), TagF32(), out + 4);
  }
};

template <int kImmediate>
HWY_INLINE VecU32 ShuffleBlock(VecU32 v) {
  return VecU32(__builtin_shufflevector(v.raw, v.raw, kImmediate & 3, kImmediate >> 2 & 3,
                                        kImmediate >> 4 & 3, kImmediate >> 6));
}
template <bool kOdd>
HWY_INLINE VecU32 EveryOther(VecU32 a, VecU32 b) {
  return kOdd ? VecU32(vuzp2q_u32(a.raw, b.raw)) : VecU32(vuzp1q_u32(a.raw, b.raw));
}
HWY_INLINE VecU32 OrIntoFourth(VecU32 rest, VecU32 a, VecU32 b) {
  return VecU32(__builtin_shufflevector(rest.raw, vorrq_u32(a.raw, b.raw), 0, 1, 2, 7));
}
template <int kStride>
HWY_INLINE VecF32 Partner(VecF32 x) {
  static_assert(kStride == 1 || kStride == 2);
  if constexpr (kStride == 1) return hn::Shuffle2301(x);
  return hn::Shuffle1032(x);
}
HWY_INLINE VecI32 NearestSmallInt(VecF32 x) { return hn::NearestInt(x); }
HWY_INLINE VecI16 PackBlocks(VecI32 a, VecI32 b) { return VecI16(vqmovn_high_s32(vqmovn_s32(a.raw), b.raw)); }
HWY_INLINE VecI16 MulFractions(VecI16 a, VecI16 b) { return hn::MulFixedPoint15(a, b); }
HWY_INLINE void StoreBlockSum(VecF32 sum, float* HWY_RESTRICT out) { hn::Store(sum, TagF32(), out); }
HWY_INLINE VecF32 SwapChunks(VecF32 v) { return v; }
HWY_INLINE VecU8 AddWhereSet(VecU8 codes, const uint8_t* bits, uint8_t value) {
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
  const uint8x16_t spread = vcombine_u8(vld1_dup_u8(bits), vld1_dup_u8(bits + 1));
  return VecU8(vorrq_u8(codes.raw, vandq_u8(vtstq_u8(spread, bit), vdupq_n_u8(value))));
}
template <int kEntries>
class ByteTable {
 public:
  HWY_INLINE explicit ByteTable(const int8_t* table) {
    if constexpr (kEntries == 16) bytes_ = vld1q_s8(table);
    if constexpr (kEntries == 32) bytes_ = {{vld1q_s8(table), vld1q_s8(table + 16)}};
    if constexpr (kEntries == 64)
      bytes_ = {{vld1q_s8(table), vld1q_s8(table + 16), vld1q_s8(table + 32), vld1q_s8(table + 48)}};
  }
  HWY_INLINE VecI8 Of(VecI8 index) const {
    const uint8x16_t at = vreinterpretq_u8_s8(index.raw);
    if constexpr (kEntries == 16) return VecI8(vqtbl1q_s8(bytes_, at));
    if constexpr (kEntries == 32) return VecI8(vqtbl2q_s8(bytes_, at));
    if constexpr (kEntries == 64) return VecI8(vqtbl4q_s8(bytes_, at));
  }

 private:
  std::conditional_t<kEntries == 16, int8x16_t, std::conditional_t<kEntries == 32, int8x16x2_t, int8x16x4_t> >
      bytes_;
};

#endif

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
