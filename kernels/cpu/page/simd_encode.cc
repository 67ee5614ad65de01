#include "kernels/cpu/page/simd_encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/page/simd_targets.h"
#include "kernels/format/page_codec.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/page/simd_encode.cc"
// What follows foreach_target.h is compiled once for each instruction set.
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/page/simd_decode-inl.h"
#include "kernels/cpu/page/simd_tide_encode-inl.h"
#include "kernels/cpu/page/simd_values-inl.h"
// clang-format on

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

constexpr int kMaxDim = 512;

// ---- Rotations: the butterflies of Hadamard runs of 32, 64 and 128; everything else by its own plain code.
// Additions and multiplications are those of the plain code, so the results are the same bits.

// Sum in the lanes without bit kStride, difference in those with it.
template <int kStride>
HWY_INLINE VecF32 ButterflyInside(VecF32 x) {
  alignas(64) uint32_t signs[kLanes];
  for (int i = 0; i < kLanes; i++) signs[i] = (i & kStride) != 0 ? 0x80000000u : 0;
  const VecF32 mask = hn::BitCast(TagF32(), hn::Load(TagU32(), signs));
  return hn::Add(Partner<kStride>(x), hn::Xor(x, mask));
}

// S2 H S1 x / sqrt(n); the inverse exchanges the signs.
template <int kDim>
HWY_INLINE void HadamardRun(float* x, bool inverse) {
  constexpr int kVectors = kDim / kLanes;
  const TagF32 f32;
  VecF32 v[kVectors];
  alignas(64) uint32_t first[kDim], second[kDim];
  for (int i = 0; i < kDim; i++) {
    first[i] = (Hadamard::Sign(inverse ? 1 : 0, i / 32) >> (i % 32) & 1u) << 31;
    second[i] = (Hadamard::Sign(inverse ? 0 : 1, i / 32) >> (i % 32) & 1u) << 31;
  }
  KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++) {
    v[i] = hn::Xor(hn::LoadU(f32, x + i * kLanes), hn::BitCast(f32, hn::Load(TagU32(), first + i * kLanes)));
    v[i] = ButterflyInside<2>(ButterflyInside<1>(v[i]));
    if constexpr (kLanes > 4) v[i] = ButterflyInside<4>(v[i]);
    if constexpr (kLanes > 8) v[i] = ButterflyInside<8>(v[i]);
  }
  KVTIDE_UNROLL
  for (int h = 1; h < kVectors; h *= 2) KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++)
    if ((i & h) == 0) {
      const VecF32 a = v[i], b = v[i + h];
      v[i] = hn::Add(a, b);
      v[i + h] = hn::Sub(a, b);
    }
  const VecF32 factor = hn::Set(f32, kDim == 128  ? 0.08838834764831845f
                                     : kDim == 64 ? 0.125f
                                                  : 0.17677669529663687f);
  KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++)
    hn::StoreU(hn::Xor(hn::Mul(v[i], factor), hn::BitCast(f32, hn::Load(TagU32(), second + i * kLanes))), f32,
               x + i * kLanes);
}

HWY_NOINLINE void RotateHadamard(float* x, int dim, bool inverse) {
  for (int i = 0; i < dim; i += 128) {
    switch (dim - i) {
      case 32:
        HadamardRun<32>(x + i, inverse);
        break;
      case 64:
        HadamardRun<64>(x + i, inverse);
        break;
      case 96:
        inverse ? Hadamard::Inverse(x + i, 96) : Hadamard::Forward(x + i, 96);
        break;
      default:
        HadamardRun<128>(x + i, inverse);
        break;
    }
  }
}

template <class Rotation>
HWY_INLINE void RotateVector(float* x, int dim) {
  if constexpr (std::is_same_v<Rotation, Hadamard>) {
    RotateHadamard(x, dim, false);
  } else {
    Rotation::Forward(x, dim);
  }
}

// ---- Quantisers: codebook types by vectors, others by their own plain code.

// The end of TreeSum: 32 partial sums, added in halves.
HWY_INLINE float FoldPartials(const VecF32 (&partial)[32 / kLanes]) {
  constexpr int kParts = 32 / kLanes;
  VecF32 sums[kParts];
  KVTIDE_UNROLL
  for (int i = 0; i < kParts; i++) sums[i] = partial[i];
  KVTIDE_UNROLL
  for (int h = kParts / 2; h > 0; h /= 2) KVTIDE_UNROLL
  for (int i = 0; i < h; i++) sums[i] = hn::Add(sums[i], sums[i + h]);
  VecF32 sum = sums[0];
  if constexpr (kLanes > 8) sum = hn::Add(sum, Partner<8>(sum));
  if constexpr (kLanes > 4) sum = hn::Add(sum, Partner<4>(sum));
  sum = hn::Add(sum, hn::Shuffle1032(sum));
  sum = hn::Add(sum, hn::Shuffle2301(sum));
  return hn::GetLane(sum);
}

template <class C>
concept CodebookType = requires {
  typename C::Book;
  { C::kHalf } -> std::convertible_to<int>;
};

template <class C>
HWY_INLINE uint16_t EncodeCodebookGroup(const float* y, int n, uint8_t* codes) {
  constexpr int kHalf = C::kHalf, kParts = 32 / kLanes;
  const TagF32 f32;
  const TagI32 i32;
  const hn::Rebind<uint8_t, TagI32> u8;
  VecF32 partial[kParts];
  KVTIDE_UNROLL
  for (int p = 0; p < kParts; p++) {
    const VecF32 v = hn::LoadU(f32, y + p * kLanes);
    partial[p] = hn::Mul(v, v);
  }
  for (int i = 32; i < n; i += 32) KVTIDE_UNROLL
  for (int p = 0; p < kParts; p++) {
    const VecF32 v = hn::LoadU(f32, y + i + p * kLanes);
    partial[p] = hn::Add(partial[p], hn::Mul(v, v));
  }
  const float energy = FoldPartials(partial);
  if (!(energy > 0)) {
    for (int i = 0; i < n; i++) codes[i] = kHalf;
    return 0;
  }
  const float to_level = C::Book::kSigma / std::sqrt(energy / static_cast<float>(n));
  const VecF32 factor = hn::Set(f32, to_level), zero = hn::Zero(f32);
  KVTIDE_UNROLL
  for (int p = 0; p < kParts; p++) partial[p] = zero;
  for (int i = 0; i < n; i += 32) KVTIDE_UNROLL
  for (int p = 0; p < kParts; p++) {
    const VecF32 value = hn::LoadU(f32, y + i + p * kLanes);
    const VecF32 v = hn::Mul(value, factor), magnitude = hn::Abs(v);
    VecI32 above = hn::Zero(i32);
    VecF32 level = hn::Set(f32, static_cast<float>(C::Book::Positive(0)));
    KVTIDE_UNROLL
    for (int m = 0; m + 1 < kHalf; m++) {
      const VecF32 midpoint =
          hn::Set(f32, 0.5f * static_cast<float>(C::Book::Positive(m) + C::Book::Positive(m + 1)));
      const auto larger = hn::Gt(magnitude, midpoint);
      above = hn::IfThenElse(hn::RebindMask(i32, larger), hn::Set(i32, m + 1), above);
      level = hn::IfThenElse(larger, hn::Set(f32, static_cast<float>(C::Book::Positive(m + 1))), level);
    }
    const auto positive = hn::Gt(v, zero);
    level = hn::IfThenElse(positive, level, hn::Neg(level));
    const VecI32 code = hn::IfThenElse(hn::RebindMask(i32, positive), hn::Add(hn::Set(i32, kHalf), above),
                                       hn::Sub(hn::Set(i32, kHalf - 1), above));
    hn::StoreU(hn::DemoteTo(u8, code), u8, codes + i + p * kLanes);
    const VecF32 product = hn::Mul(value, level);
    partial[p] = i == 0 ? product : hn::Add(partial[p], product);
  }
  return ScaleBits(Mul(energy / FoldPartials(partial), 1.0f / C::kLevelUnit));
}

// ---- Packing

constexpr int kWordsMax = kBlockTokens * kMaxDim / 8;

// Units of 8 codes as the words they are cut from: low nibbles (8-bit types: codes 0-3) and fifth bits (codes
// 4-7).
struct UnitWords {
  alignas(64) uint32_t low[kWordsMax];
  alignas(64) uint32_t high[kWordsMax];
};

template <int kBits>
HWY_INLINE void StoreUnit(const uint32_t (&c)[8], uint32_t& low, uint32_t& high) {
  if constexpr (kBits == 8) {
    low = c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24;
    high = c[4] | c[5] << 8 | c[6] << 16 | c[7] << 24;
  } else {
    uint32_t w = 0, h = 0;
    KVTIDE_UNROLL
    for (int e = 0; e < 8; e++) {
      w |= (kBits == 5 ? c[e] & 15u : c[e]) << (4 * e);
      if constexpr (kBits == 5) h |= c[e] >> 4 << (4 * e);
    }
    low = w;
    if constexpr (kBits == 5) high = h;
  }
}

// Key units: [token][dim / 8]. Value units: [token / 8][dim].
template <int kBits>
HWY_NOINLINE void KeyUnits(const uint8_t* HWY_RESTRICT codes, int dim, UnitWords& words) {
  for (int u = 0; u < kBlockTokens * dim / 8; u++) {
    uint32_t c[8];
    for (int e = 0; e < 8; e++) c[e] = codes[8 * u + e];
    StoreUnit<kBits>(c, words.low[u], words.high[u]);
  }
}
template <int kBits>
HWY_NOINLINE void ValueUnits(const uint8_t* HWY_RESTRICT codes, int dim, UnitWords& words) {
  for (int octet = 0; octet < 8; octet++) {
    const uint8_t* rows = codes + 8 * octet * dim;
    for (int d = 0; d < dim; d++) {
      uint32_t c[8];
      for (int e = 0; e < 8; e++) c[e] = rows[e * dim + d];
      StoreUnit<kBits>(c, words.low[octet * dim + d], words.high[octet * dim + d]);
    }
  }
}

// The words of a quad from its four units (page_order.h).
template <int kBits>
HWY_INLINE void QuadWords(const uint32_t (&low)[4], const uint32_t (&high)[4], uint32_t (&words)[kBits]) {
  if constexpr (kBits == 8) {
    for (int i = 0; i < 4; i++) {
      words[2 * i] = low[i];
      words[2 * i + 1] = high[i];
    }
  } else if constexpr (kBits == 5) {
    for (int i = 0; i < 4; i++) words[i] = low[i];
    words[4] = high[0] | high[1] << 1 | high[2] << 2 | high[3] << 3;
  } else if constexpr (kBits == 4) {
    for (int i = 0; i < 4; i++) words[i] = low[i];
  } else if constexpr (kBits == 3) {
    for (int b = 0; b < 3; b++) words[b] = low[b] | (low[3] >> b & 0x11111111u) << 3;
  } else {
    words[0] = low[0] | low[1] << 2;
    words[1] = low[2] | low[3] << 2;
  }
}

template <int kBits>
HWY_NOINLINE void PackPlane(Side side, int dim, const uint8_t* codes, std::byte* plane) {
  UnitWords units;
  if (side == Side::kKey) {
    KeyUnits<kBits>(codes, dim, units);
  } else {
    ValueUnits<kBits>(codes, dim, units);
  }
  const int quads = dim / 32;
  for (int quad = 0; quad < 2 * quads; quad++)
    for (int lane = 0; lane < 32; lane++) {
      const int n = lane >> 2, c = lane & 3;
      uint32_t low[4], high[4] = {}, words[kBits];
      for (int i = 0; i < 4; i++) {
        const int token = quad / quads * 32 + 8 * (n >> 1) + 2 * i + (n & 1);
        const int unit = side == Side::kKey ? token * (dim / 8) + quad % quads * 4 + c
                                            : (quad % 2 * 4 + c) * dim + quad / 2 * 32 + 8 * i + n;
        low[i] = units.low[unit];
        if constexpr (kBits == 8 || kBits == 5) high[i] = units.high[unit];
      }
      QuadWords<kBits>(low, high, words);
      for (int w = 0; w < kBits; w++) StoreWord(plane, quad * kBits + w, lane, words[w]);
    }
}

// ---- Half pages

// C: the codec without its rotation, so that types that differ only there share code.
template <class Rotation, class C>
HWY_NOINLINE void EncodeCoded(Side side, const HalfLayout& layout, const HeadProfile* profile,
                              const float* rows, int tokens, std::byte* half) {
  const int dim = layout.stored_dim;
  const size_t width = static_cast<size_t>(layout.head_dim);
  const float* mean = profile == nullptr || profile->mean.empty() ? nullptr : profile->mean.data();
  const float* gain = profile == nullptr || profile->gain.empty() ? nullptr : profile->gain.data();
  std::memset(half, 0, layout.bytes);
  alignas(64) uint8_t codes[kBlockTokens * kMaxDim];
  alignas(64) float y[kMaxDim];
  auto* scales = reinterpret_cast<uint16_t*>(half + layout.code_bytes);
  for (int t = 0; t < kBlockTokens; t++) {
    std::fill_n(y, dim, 0.0f);
    if (t < tokens) {
      std::memcpy(y, rows + static_cast<size_t>(t) * width, width * sizeof(float));
      if (mean != nullptr)
        for (size_t i = 0; i < width; i++) y[i] -= mean[i];
      if (gain != nullptr)
        for (size_t i = 0; i < width; i++) y[i] *= gain[i];
    }
    RotateVector<Rotation>(y, dim);
    for (int g = 0, begin = 0; begin < dim; g++, begin += C::kGroup) {
      const int n = std::min(dim - begin, static_cast<int>(C::kGroup));
      uint8_t* group_codes = codes + t * dim + begin;
      uint16_t scale;
      if constexpr (CodebookType<C>) {
        scale = EncodeCodebookGroup<C>(y + begin, n, group_codes);
      } else {
        scale = C::EncodeGroup(y + begin, n, side, group_codes);
      }
      scales[g * kBlockTokens + t] = scale;
    }
  }
  PackPlane<C::kBits>(side, dim, codes, half);
}

void Encode(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile, int64_t position,
            const float* rows, int tokens, std::byte* half) {
  if (Info(type).calibrated) {
    KVTIDE_CHECK(side == Side::kKey && profile != nullptr, Name(type), " without a profile");
    return EncodeTide(type, layout, *profile, position, rows, tokens, half);
  }
  if (Info(type).storage == Storage::kHalf)
    return EncodeHalf(type, side, layout, profile, rows, tokens, half);
  VisitCodec(type, [&](auto codec) {
    using C = decltype(codec);
    if constexpr (C::kStorage == Storage::kCodes)
      EncodeCoded<typename C::Rotation, typename C::Stored>(side, layout, profile, rows, tokens, half);
  });
}

HWY_INLINE void StoreRow(const float* row, bool bf16, int dim, int token, uint16_t* values) {
  const hn::CappedTag<float, 8> f32;
  const hn::Rebind<hwy::float16_t, decltype(f32)> f16;
  constexpr int kStep = static_cast<int>(hn::MaxLanes(f32));
  for (int d = 0; d < dim; d += kStep) {
    uint16_t* target = values + HalfPrecisionIndex(token, d, dim);
    if (bf16) {
      Narrow(row + d, kStep, {target, DataType::kBf16}, 0);
    } else {
      hn::StoreU(hn::DemoteTo(f16, hn::LoadU(f32, row + d)), f16, reinterpret_cast<hwy::float16_t*>(target));
    }
  }
}

void StoreRows(CacheType type, const HalfLayout& layout, TensorView rows, size_t first_element, size_t stride,
               int first_token, int tokens, std::byte* half) {
  const bool bf16 = CodeTableOf(type).bf16;
  const size_t width = static_cast<size_t>(layout.head_dim);
  float row[kMaxDim] = {};
  for (int i = 0; i < tokens; i++) {
    const size_t element = first_element + static_cast<size_t>(i) * stride;
    Widen(rows, element, width, row);
    StoreRow(row, bf16, layout.stored_dim, first_token + i, reinterpret_cast<uint16_t*>(half));
  }
}

bool UsesHadamard(CacheType type) {
  return VisitCodec(type, [](auto codec) {
    using C = decltype(codec);
    if constexpr (C::kStorage == Storage::kCodes) {
      return std::is_same_v<typename C::Rotation, Hadamard>;
    } else {
      return false;
    }
  });
}

void Rotate(CacheType type, bool inverse, float* x, int dim) {
  if (UsesHadamard(type)) return RotateHadamard(x, dim, inverse);
  inverse ? RotateInverse(type, x, dim) : RotateForward(type, x, dim);
}

// By tiles, which lie by positions, to rows.
void DecodeCoded(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                 const std::byte* half, float* rows) {
  const int dim = layout.stored_dim;
  const size_t width = static_cast<size_t>(layout.head_dim);
  const float* mean = profile == nullptr || profile->mean.empty() ? nullptr : profile->mean.data();
  const float* gain = profile == nullptr || profile->gain.empty() ? nullptr : profile->gain.data();
  hwy::AlignedFreeUniquePtr<uint8_t[]> copy;
  const auto* bytes = reinterpret_cast<const uint8_t*>(half);
  if (reinterpret_cast<uintptr_t>(bytes) % HWY_MAX_BYTES != 0) {  // code planes are read in whole vectors
    copy = hwy::AllocateAligned<uint8_t>(layout.bytes);
    std::memcpy(copy.get(), bytes, layout.bytes);
    bytes = copy.get();
  }
  const HalfView view{&CodeTableOf(type), dim, layout.groups, bytes, bytes + layout.code_bytes};
  const auto tile = hwy::AllocateAligned<float>(static_cast<size_t>(kBlockTokens * dim));
  side == Side::kKey ? DecodeCodedKeys(view, tile.get()) : DecodeCodedValues(view, tile.get());
  alignas(64) float y[kMaxDim];
  for (int t = 0; t < kBlockTokens; t++) {
    const int position = TokenPosition(t);
    if (side == Side::kKey) {
      for (int d = 0; d < dim; d++) y[d] = tile[static_cast<size_t>(d * kBlockTokens + position)];
    } else {
      for (int p = 0; p < dim; p++) y[DimAtPosition(p)] = tile[static_cast<size_t>(position * dim + p)];
    }
    Rotate(type, true, y, dim);
    if (gain != nullptr)
      for (size_t i = 0; i < width; i++) y[i] /= gain[i];
    if (mean != nullptr)
      for (size_t i = 0; i < width; i++) y[i] += mean[i];
    std::memcpy(rows + static_cast<size_t>(t) * width, y, width * sizeof(float));
  }
}

void Decode(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile, int64_t position,
            const std::byte* half, float* rows) {
  const CodeTable& table = CodeTableOf(type);
  if (table.calibrated) {
    KVTIDE_CHECK(side == Side::kKey && profile != nullptr, Name(type), " without a profile");
    return DecodeTide(type, layout, *profile, position, half, rows);
  }
  if (table.coded()) return DecodeCoded(type, side, layout, profile, half, rows);
  float row[kMaxDim];
  for (int t = 0; t < kBlockTokens; t++) {
    DecodeRowHalf(reinterpret_cast<const uint8_t*>(half), table.bf16, layout.stored_dim, t, row);
    std::memcpy(rows + t * layout.head_dim, row, static_cast<size_t>(layout.head_dim) * sizeof(float));
  }
}

void UseEncoders(PageKernels& kernels) {
  kernels.rotate = Rotate;
  kernels.turn_query = TurnQuery;
  kernels.store_rows = StoreRows;
  kernels.encode = Encode;
  kernels.decode = Decode;
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace kvtide {

void UseSimdEncoders(SimdLevel level, PageKernels& kernels) {
#if HWY_TARGETS & HWY_AVX2
  if (level == SimdLevel::kAvx2) N_AVX2::UseEncoders(kernels);
#endif
#if HWY_TARGETS & HWY_AVX3_DL
  if (level == SimdLevel::kAvx512) N_AVX3_DL::UseEncoders(kernels);
#endif
#if HWY_TARGETS & KVTIDE_NEON
  if (level == SimdLevel::kNeon) N_NEON::UseEncoders(kernels);
#endif
  (void)level;
  (void)kernels;
}

}  // namespace kvtide
#endif  // HWY_ONCE
