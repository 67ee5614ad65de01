// Attention of up to 8 rows over pages, for decoding: codes are decoded once for all rows, into 16-bit levels
// that meet 16-bit queries and weights in integer dot products; f16 and bf16 pages meet f32. Included once
// for each instruction set.
//
// K: lane = token, so a dot product over dims needs no sum across lanes. V: lane = dim. The weights of a page
// are 16-bit integers relative to its largest, V scale included: neither a sink elsewhere nor large V of
// tokens without weight can wipe a page out, and rounding cannot carry a weight past 32767 (it is clamped as
// well).
#if defined(KVTIDE_KERNELS_CPU_SIMD_FEW_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_FEW_ROWS_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_FEW_ROWS_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_FEW_ROWS_INL_H_
#endif

#include <algorithm>

#include "kernels/cpu/page_segment.h"
#include "kernels/cpu/simd_level_dots-inl.h"
#include "kernels/cpu/simd_page-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// Four columns make a quad of work. On AVX2 the prefetches of all come at once: GCC lets no sum stay in a
// register over their loop.
template <int kColumn>
HWY_INLINE void PrefetchForColumn(Prefetcher& prefetch) {
  if constexpr (kWide) {
    prefetch.Step();
  } else if constexpr (kColumn == 0) {
    prefetch.Step(4);
  }
}

// ---- K of coded types

// One quad row (32 dims) of kVectors token vectors from vector `first` on.
template <int kBits, int kRows, int kVectors, int kColumn>
HWY_INLINE void KeyColumn(const LevelDots<kBits>& level_dots, const uint8_t* codes, int quads, int quad,
                          int first, const int32_t* HWY_RESTRICT q, VecI32 (&acc)[kVectors][kRows]) {
  const uint8_t* at[kVectors];
  KVTIDE_UNROLL
  for (int v = 0; v < kVectors; v++) {
    const int vector = first + v, half = vector / kQuadVectors;
    at[v] = codes + ColumnOffset(kColumn, vector % kQuadVectors) + QuadOffset<kBits>(half * quads + quad);
  }
  level_dots.template Add<kColumn % 2 == 1>(
      at, [&](int pair, int r, int) HWY_ATTR { return q[(kColumn * 4 + pair) * kRows + r]; }, acc);
}

template <int kBits, int kRows, int kVectors>
HWY_INLINE void KeyQuad(const LevelDots<kBits>& level_dots, const HalfView& k, int quads, int quad, int first,
                        const int32_t* HWY_RESTRICT q, VecI32 (&acc)[kVectors][kRows]) {
  PrefetchForColumn<0>(*k.prefetch);
  KeyColumn<kBits, kRows, kVectors, 0>(level_dots, k.codes, quads, quad, first, q, acc);
  PrefetchForColumn<1>(*k.prefetch);
  KeyColumn<kBits, kRows, kVectors, 1>(level_dots, k.codes, quads, quad, first, q, acc);
  PrefetchForColumn<2>(*k.prefetch);
  KeyColumn<kBits, kRows, kVectors, 2>(level_dots, k.codes, quads, quad, first, q, acc);
  PrefetchForColumn<3>(*k.prefetch);
  KeyColumn<kBits, kRows, kVectors, 3>(level_dots, k.codes, quads, quad, first, q, acc);
}

// Dots of kVectors token vectors with all rows: scale times integer dot, summed over the groups.
template <int kBits, int kRows, int kVectors>
HWY_INLINE void KeyVectors(const LevelDots<kBits>& level_dots, const HalfView& k, const int32_t* q,
                           const int32_t* starts, const float* scales, int first, float* HWY_RESTRICT dots) {
  const int quads = k.dim / 32, step = k.table->group / 32;
  for (int group = 0; group < k.groups; group++) {
    VecI32 acc[kVectors][kRows];
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) KVTIDE_UNROLL
    for (int r = 0; r < kRows; r++)
      acc[v][r] =
          LevelDots<kBits>::kOffset ? hn::Set(TagI32(), starts[group * kRows + r]) : hn::Zero(TagI32());
    const int end = std::min(quads, (group + 1) * step);
    for (int quad = group * step; quad < end; quad++) {
      KeyQuad<kBits, kRows, kVectors>(level_dots, k, quads, quad, first, q + quad * 16 * kRows, acc);
    }
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) {
      const int at = (first + v) * kLanes;
      const VecF32 scale = hn::Load(TagF32(), scales + group * kBlockTokens + at);
      KVTIDE_UNROLL
      for (int r = 0; r < kRows; r++) {
        float* target = dots + r * kBlockTokens + at;
        const VecF32 before = group > 0 ? hn::Load(TagF32(), target) : hn::Zero(TagF32());
        hn::Store(hn::MulAdd(hn::ConvertTo(TagF32(), acc[v][r]), scale, before), TagF32(), target);
      }
    }
  }
}

template <int kBits, int kRows>
HWY_NOINLINE void KeyDots(const HalfView& k, const int32_t* q, const int32_t* starts,
                          float* HWY_RESTRICT dots) {
  alignas(64) float scales[kMaxGroups * kBlockTokens];
  for (int g = 0; g < k.groups; g++) LoadScales(k.scales + g * kBlockTokens * 2, scales + g * kBlockTokens);
  const LevelDots<kBits> level_dots(*k.table);
  constexpr int kVectors = VectorsFor(kRows);
  for (int first = 0; first < kPageVectors; first += kVectors)
    KeyVectors<kBits, kRows, kVectors>(level_dots, k, q, starts, scales, first, dots);
}

// ---- V of coded types

// Weights times V scales as pairs of 16-bit integers, in packed[group][row][32 words], relative to the
// largest product of the row. factors[row]: what one unit of the integer sums stands for.
//
// A block of four positions holds tokens 0,2,4,6 or 1,3,5,7 of an octet; it gives two words, of positions
// (0,2) and (1,3), or (0,1) and (2,3) for 8-bit codes, whose pairs are cut so. Two vectors of positions are
// packed into one of words.
constexpr int kPackedWords = kBlockTokens / 2;
constexpr int PackedWord(int octet, int pair) {
  const int block = 2 * octet + pair % 2, blocks = kLanes / 4, vector = block / blocks;
  return vector / 2 * kLanes + block % blocks * 4 + vector % 2 * 2 + pair / 2;
}

// Two vectors of 32-bit integers as one of 16-bit ones, in the order of packed words.
template <int kBits>
HWY_INLINE VecI16 PackPair(VecI32 a, VecI32 b) {
#if HWY_TARGET == HWY_AVX2
  const VecI16 packed{_mm256_packs_epi32(a.raw, b.raw)};
#else
  const VecI16 packed{_mm512_packs_epi32(a.raw, b.raw)};
#endif
  if constexpr (kBits == 8) return packed;
  // Positions 0,2,1,3 of each half of a 16-byte block.
  alignas(16) static constexpr uint8_t kOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  return hn::BitCast(TagI16(),
                     hn::TableLookupBytes(hn::BitCast(TagU8(), packed), hn::LoadDup128(TagU8(), kOrder)));
}

// Products of fractions of 32768, rounded.
HWY_INLINE VecI16 MulFractions(VecI16 a, VecI16 b) {
#if HWY_TARGET == HWY_AVX2
  return VecI16{_mm256_mulhrs_epi16(a.raw, b.raw)};
#else
  return VecI16{_mm512_mulhrs_epi16(a.raw, b.raw)};
#endif
}

// A token's weight times its largest scale, and its scales relative to that one, both as 16-bit fractions:
// then every (row, group) costs one multiplication for two vectors of tokens.
template <int kBits, int kRows>
HWY_INLINE void PackWeights(const HalfView& v, const float* weights, const PageFactors* page,
                            int32_t* HWY_RESTRICT packed, int32_t* HWY_RESTRICT starts,
                            float* HWY_RESTRICT factors) {
  constexpr int kPairs = kPageVectors / 2;
  constexpr int16_t kOffset = LevelDots<kBits>::kOffset;
  const TagF32 f32;
  const VecF32 one = hn::Set(f32, 32767.0f);
  alignas(64) float scales[kMaxGroups * kBlockTokens];
  alignas(64) int16_t shares[kMaxGroups * kBlockTokens];  // [group][word]
  VecF32 largest_scale[kPageVectors];
  for (int g = 0; g < v.groups; g++) {
    LoadScales(v.scales + g * kBlockTokens * 2, scales + g * kBlockTokens);
    KVTIDE_UNROLL
    for (int i = 0; i < kPageVectors; i++) {
      const VecF32 size = hn::Abs(hn::Load(f32, scales + g * kBlockTokens + i * kLanes));
      largest_scale[i] = g == 0 ? size : hn::Max(largest_scale[i], size);
    }
  }
  VecF32 to_share[kPageVectors];
  KVTIDE_UNROLL
  for (int i = 0; i < kPageVectors; i++)
    to_share[i] = hn::IfThenElseZero(hn::Gt(largest_scale[i], hn::Zero(f32)), hn::Div(one, largest_scale[i]));
  for (int g = 0; g < v.groups; g++) {
    const float* group_scales = scales + g * kBlockTokens;
    KVTIDE_UNROLL
    for (int i = 0; i < kPageVectors; i += 2) {
      const VecI32 a = NearestSmallInt(hn::Mul(hn::Load(f32, group_scales + i * kLanes), to_share[i]));
      const VecI32 b =
          NearestSmallInt(hn::Mul(hn::Load(f32, group_scales + (i + 1) * kLanes), to_share[i + 1]));
      hn::Store(PackPair<kBits>(a, b), TagI16(), shares + g * kBlockTokens + i * kLanes);
    }
  }
  alignas(64) float maximum[kLanes] = {}, to_int[kLanes];
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++) {
    VecF32 largest = hn::Zero(f32);
    KVTIDE_UNROLL
    for (int i = 0; i < kPageVectors; i++)
      largest =
          hn::Max(largest, hn::Mul(hn::Load(f32, weights + r * kBlockTokens + i * kLanes), largest_scale[i]));
    maximum[r] = hn::GetLane(hn::MaxOfLanes(f32, largest));
  }
  const VecF32 maxima = hn::Load(f32, maximum);
  hn::Store(hn::IfThenElseZero(hn::Gt(maxima, hn::Set(f32, 1e-30f)), hn::Div(one, maxima)), f32, to_int);
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++) {
    // 32767 and 32767 of 32768 make one.
    factors[r] = page[r].page * maximum[r] * (v.table->unit * 32768.0f / (32767.0f * 32767.0f));
    VecF32 scaled[kPageVectors];
    KVTIDE_UNROLL
    for (int i = 0; i < kPageVectors; i++)
      scaled[i] = hn::Mul(hn::Mul(hn::Load(f32, weights + r * kBlockTokens + i * kLanes), largest_scale[i]),
                          hn::Set(f32, to_int[r]));
    VecI16 w[kPairs];
    KVTIDE_UNROLL
    for (int i = 0; i < kPageVectors; i += 2)
      w[i / 2] = PackPair<kBits>(NearestSmallInt(scaled[i]), NearestSmallInt(scaled[i + 1]));
    for (int g = 0; g < v.groups; g++) {
      VecI32 sum = hn::Zero(TagI32());
      KVTIDE_UNROLL
      for (int i = 0; i < kPairs; i++) {
        const VecI16 share = hn::Load(TagI16(), shares + g * kBlockTokens + 2 * i * kLanes);
        const VecI16 words = MulFractions(w[i], share);
        hn::Store(hn::BitCast(TagI32(), words), TagI32(),
                  packed + (g * kRows + r) * kPackedWords + i * kLanes);
        if constexpr (kOffset != 0) sum = AddDots(sum, words, hn::Set(TagI16(), -kOffset));
      }
      if constexpr (kOffset != 0) starts[g * kRows + r] = hn::GetLane(hn::SumOfLanes(TagI32(), sum));
    }
  }
}

template <int kBits, int kRows, int kVectors, int kTokens, int kColumn>
HWY_INLINE void ValueColumn(const LevelDots<kBits>& level_dots, const uint8_t* codes, int first,
                            const int32_t* const* weights, VecI32 (&acc)[kVectors][kRows]) {
  const uint8_t* at[kVectors];
  KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++) {
    const int vector = first + i;
    at[i] = codes + ColumnOffset(kColumn, vector % kQuadVectors) +
            QuadOffset<kBits>(vector / kQuadVectors * 2 + kTokens);
  }
  level_dots.template Add<kColumn % 2 == 1>(
      at,
      [&](int pair, int r, int v) HWY_ATTR {
        return weights[v / kQuadVectors][r * kPackedWords + PackedWord(4 * kTokens + kColumn, pair)];
      },
      acc);
}

// Adds to kVectors dim vectors of the output from vector `first` on.
template <int kBits, int kRows, int kVectors>
HWY_INLINE void ValueVectors(const LevelDots<kBits>& level_dots, const HalfView& v, const int32_t* weights,
                             const int32_t* starts, const float* factors, const PageFactors* page, int first,
                             float* HWY_RESTRICT out) {
  const int quad_dim = first / kQuadVectors;
  const int per_group = v.table->group / 32;
  VecI32 acc[kVectors][kRows];
  KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++) KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++)
    acc[i][r] = LevelDots<kBits>::kOffset
                    ? hn::Set(TagI32(), starts[(quad_dim + i / kQuadVectors) / per_group * kRows + r])
                    : hn::Zero(TagI32());
  constexpr int kDims = (kVectors + kQuadVectors - 1) / kQuadVectors;

  const int32_t* group_weights[kDims];
  KVTIDE_UNROLL
  for (int i = 0; i < kDims; i++) {
    group_weights[i] = weights + (quad_dim + i) / per_group * kRows * kPackedWords;
  }
  PrefetchForColumn<0>(*v.prefetch);
  ValueColumn<kBits, kRows, kVectors, 0, 0>(level_dots, v.codes, first, group_weights, acc);
  PrefetchForColumn<1>(*v.prefetch);
  ValueColumn<kBits, kRows, kVectors, 0, 1>(level_dots, v.codes, first, group_weights, acc);
  PrefetchForColumn<2>(*v.prefetch);
  ValueColumn<kBits, kRows, kVectors, 0, 2>(level_dots, v.codes, first, group_weights, acc);
  PrefetchForColumn<3>(*v.prefetch);
  ValueColumn<kBits, kRows, kVectors, 0, 3>(level_dots, v.codes, first, group_weights, acc);
  PrefetchForColumn<0>(*v.prefetch);
  ValueColumn<kBits, kRows, kVectors, 1, 0>(level_dots, v.codes, first, group_weights, acc);
  PrefetchForColumn<1>(*v.prefetch);
  ValueColumn<kBits, kRows, kVectors, 1, 1>(level_dots, v.codes, first, group_weights, acc);
  PrefetchForColumn<2>(*v.prefetch);
  ValueColumn<kBits, kRows, kVectors, 1, 2>(level_dots, v.codes, first, group_weights, acc);
  PrefetchForColumn<3>(*v.prefetch);
  ValueColumn<kBits, kRows, kVectors, 1, 3>(level_dots, v.codes, first, group_weights, acc);
  const TagF32 f32;
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++) KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++) {
    float* target = out + r * v.dim + (first + i) * kLanes;
    const VecF32 factor = hn::Set(f32, factors[r]);
    const VecF32 kept = hn::Mul(hn::Load(f32, target), hn::Set(f32, page[r].keep));
    hn::Store(hn::MulAdd(hn::ConvertTo(f32, acc[i][r]), factor, kept), f32, target);
  }
}

template <int kBits, int kRows>
HWY_NOINLINE void ValueSums(const HalfView& v, const float* weights, const PageFactors* page,
                            float* HWY_RESTRICT out) {
  alignas(64) int32_t packed[kMaxGroups * kRows * kPackedWords];
  int32_t starts[kMaxGroups * kRows];
  float factors[kRows];
  PackWeights<kBits, kRows>(v, weights, page, packed, starts, factors);
  const LevelDots<kBits> level_dots(*v.table);
  constexpr int kVectors = VectorsFor(kRows);
  const int vectors = v.dim / kLanes;
  int first = 0;
  for (; first + kVectors <= vectors; first += kVectors)
    ValueVectors<kBits, kRows, kVectors>(level_dots, v, packed, starts, factors, page, first, out);
  if constexpr (kVectors > kQuadVectors) {
    if (first < vectors)
      ValueVectors<kBits, kRows, kQuadVectors>(level_dots, v, packed, starts, factors, page, first, out);
  }
}

// ---- f16 and bf16

// The XOR on the 16-byte chunk index of a token's row (page_order.h), for token 8 * octet + parity + 2 * i.
HWY_INLINE constexpr int ChunkXor(bool by_64, int parity, int i) { return by_64 ? parity + 2 * i : i; }

// Sums of the lanes of four vectors, stored next to each other.
HWY_INLINE void StoreSums(VecF32 a, VecF32 b, VecF32 c, VecF32 d, float* HWY_RESTRICT out) {
  const TagF32 f32;
  const hn::Repartition<double, TagF32> f64;
  const VecF32 ab = hn::Add(hn::InterleaveLower(f32, a, b), hn::InterleaveUpper(f32, a, b));
  const VecF32 cd = hn::Add(hn::InterleaveLower(f32, c, d), hn::InterleaveUpper(f32, c, d));
  const VecF32 low = hn::BitCast(f32, hn::InterleaveLower(f64, hn::BitCast(f64, ab), hn::BitCast(f64, cd)));
  const VecF32 high = hn::BitCast(f32, hn::InterleaveUpper(f64, hn::BitCast(f64, ab), hn::BitCast(f64, cd)));
  const VecF32 sum = hn::Add(low, high);
#if HWY_TARGET == HWY_AVX2
  _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(sum.raw), _mm256_extractf128_ps(sum.raw, 1)));
#else
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum.raw), _mm512_extractf32x8_ps(sum.raw, 1));
  _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#endif
}

// q: [rows][dim]; swapped: the same with neighbouring chunks of 8 exchanged (512-bit vectors span two
// chunks).
template <int kRows, bool kBf16>
HWY_NOINLINE void KeyDotsHalf(const HalfView& k, const float* q, const float* swapped,
                              float* HWY_RESTRICT dots) {
  constexpr int kStep = kWide ? (kRows < 4 ? kRows : 4) : (kRows < 2 ? kRows : 2);
  const TagF32 f32;
  const auto* values = reinterpret_cast<const uint16_t*>(k.codes);
  const bool by_64 = k.dim % 64 == 0;
  const int vectors = k.dim / kLanes;
  for (int octet = 0; octet < 8; octet++)
    for (int parity = 0; parity < 2; parity++) {
      const uint16_t* row[4];
      const float* query[4];
      int flip[4];  // XOR on the vector index
      for (int i = 0; i < 4; i++) {
        const int x = ChunkXor(by_64, parity, i);
        row[i] = values + (8 * octet + parity + 2 * i) * k.dim;
        flip[i] = kWide ? x >> 1 : x;
        query[i] = kWide && (x & 1) ? swapped : q;
      }
      k.prefetch->Step();
      for (int r0 = 0; r0 < kRows; r0 += kStep) {
        VecF32 acc[4][kStep];
        KVTIDE_UNROLL
        for (int i = 0; i < 4; i++) KVTIDE_UNROLL
        for (int r = 0; r < kStep; r++) acc[i][r] = hn::Zero(f32);
        if (by_64) {
          const float* shared = query[0] + r0 * k.dim;
          for (int j = 0; j < vectors; j++) {
            VecF32 x[4];
            KVTIDE_UNROLL
            for (int i = 0; i < 4; i++) x[i] = LoadHalf(row[i] + (j ^ flip[i]) * kLanes, kBf16);
            KVTIDE_UNROLL
            for (int r = 0; r < kStep; r++) {
              const VecF32 query_r = hn::LoadU(f32, shared + r * k.dim + j * kLanes);
              KVTIDE_UNROLL
              for (int i = 0; i < 4; i++) acc[i][r] = hn::MulAdd(x[i], query_r, acc[i][r]);
            }
          }
        } else {
          for (int j = 0; j < vectors; j++) KVTIDE_UNROLL
          for (int i = 0; i < 4; i++) {
            const VecF32 x = LoadHalf(row[i] + (j ^ flip[i]) * kLanes, kBf16);
            KVTIDE_UNROLL
            for (int r = 0; r < kStep; r++)
              acc[i][r] = hn::MulAdd(x, hn::LoadU(f32, query[i] + (r0 + r) * k.dim + j * kLanes), acc[i][r]);
          }
        }
        KVTIDE_UNROLL
        for (int r = 0; r < kStep; r++)
          StoreSums(acc[0][r], acc[1][r], acc[2][r], acc[3][r],
                    dots + (r0 + r) * kBlockTokens + 8 * octet + 4 * parity);
      }
    }
}

HWY_INLINE VecF32 SwapChunks(VecF32 v) {
#if HWY_TARGET == HWY_AVX2
  return v;
#else
  return VecF32{_mm512_shuffle_f32x4(v.raw, v.raw, 0x4E)};
#endif
}

// Adds weight * V of tokens [first_token, last_token) to kVectors vectors of kStep rows.
template <int kStep, int kVectors, bool kBf16>
HWY_INLINE void ValueBlockHalf(const HalfView& v, const float* weights, const PageFactors* page,
                               int first_token, int last_token, int first_vector, float* HWY_RESTRICT out) {
  const TagF32 f32;
  const auto* values = reinterpret_cast<const uint16_t*>(v.codes);
  const bool by_64 = v.dim % 64 == 0;
  VecF32 acc[kVectors][kStep];
  KVTIDE_UNROLL
  for (int r = 0; r < kStep; r++) KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++)
    acc[i][r] =
        hn::Mul(hn::Load(f32, out + r * v.dim + (first_vector + i) * kLanes), hn::Set(f32, page[r].keep));
  // Tokens whose chunks lie in order, then (512 bits) those whose neighbouring chunks are exchanged.
  for (int swap = 0; swap < (kWide ? 2 : 1); swap++) {
    if (swap == 1) {
      KVTIDE_UNROLL
      for (int r = 0; r < kStep; r++) KVTIDE_UNROLL
      for (int i = 0; i < kVectors; i++) acc[i][r] = SwapChunks(acc[i][r]);
    }
    for (int position = 0; position < kBlockTokens; position++) {
      if (position % 4 == 0) v.prefetch->Step();
      const int i = position % 4, parity = position / 4 % 2;
      const int token = TokenAtPosition(position), x = ChunkXor(by_64, parity, i);
      if ((kWide && (x & 1) != swap) || token < first_token || token >= last_token) continue;
      const int flip = kWide ? x >> 1 : x;
      const uint16_t* row = values + token * v.dim;
      VecF32 value[kVectors];
      KVTIDE_UNROLL
      for (int c = 0; c < kVectors; c++)
        value[c] = LoadHalf(row + ((first_vector + c) ^ flip) * kLanes, kBf16);
      KVTIDE_UNROLL
      for (int r = 0; r < kStep; r++) {
        const VecF32 weight = hn::Set(f32, weights[r * kBlockTokens + position]);
        KVTIDE_UNROLL
        for (int c = 0; c < kVectors; c++) acc[c][r] = hn::MulAdd(value[c], weight, acc[c][r]);
      }
    }
  }
  KVTIDE_UNROLL
  for (int r = 0; r < kStep; r++) KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++)
    hn::Store(kWide ? SwapChunks(acc[i][r]) : acc[i][r], f32, out + r * v.dim + (first_vector + i) * kLanes);
}

template <int kRows, bool kBf16>
HWY_NOINLINE void ValueSumsHalf(const HalfView& v, float* HWY_RESTRICT weights, const PageFactors* page,
                                int first_token, int last_token, float* HWY_RESTRICT out) {
  constexpr int kStep = kWide ? (kRows < 4 ? kRows : 4) : (kRows < 2 ? kRows : 2);
  constexpr int kVectors = 4;
  const TagF32 f32;
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < kPageVectors; i++) {
      float* w = weights + r * kBlockTokens + i * kLanes;
      hn::Store(hn::Mul(hn::Load(f32, w), hn::Set(f32, page[r].page)), f32, w);
    }
  const int vectors = v.dim / kLanes;
  for (int r = 0; r < kRows; r += kStep) {
    int first = 0;
    for (; first + kVectors <= vectors; first += kVectors) {
      ValueBlockHalf<kStep, kVectors, kBf16>(v, weights + r * kBlockTokens, page + r, first_token, last_token,
                                             first, out + r * v.dim);
    }
    for (; first < vectors; first += 2)
      ValueBlockHalf<kStep, 2, kBf16>(v, weights + r * kBlockTokens, page + r, first_token, last_token, first,
                                      out + r * v.dim);
  }
}

// ---- Rows and pages

// The widths that have kernels: pages of other widths are turned into these first.
constexpr int KernelBits(int bits) { return bits <= 4 ? 4 : 8; }

// Up to kRows rows, prepared for K's type; missing rows are zero queries.
template <int kRows>
struct PreparedRows {
  hwy::AlignedFreeUniquePtr<float[]> floats;   // f16, bf16: [kRows][dim], then the same with chunks exchanged
  hwy::AlignedFreeUniquePtr<int32_t[]> pairs;  // coded: [dim / 32][column][pair][row]
  int32_t starts[kMaxGroups * kRows] = {};     // coded: [group][row], what sums begin with
  LogitScale scale[kRows];
  int64_t begin[kRows], end[kRows];
};

template <int kRows>
void PrepareRows(const QueryRows& rows, int first, const CodeTable& table, int dim,
                 PreparedRows<kRows>& out) {
  const size_t size = static_cast<size_t>(kRows * dim);
  std::vector<float> q(size, 0.0f);
  const int count = std::min(kRows, rows.rows - first);
  std::copy_n(rows.q + static_cast<size_t>(first) * static_cast<size_t>(dim),
              static_cast<size_t>(count) * static_cast<size_t>(dim), q.data());
  for (int r = 0; r < kRows; r++) {
    const int source = first + std::min(r, count - 1);
    out.begin[r] = rows.begin[source];
    out.end[r] = rows.end[source];
    out.scale[r].factor = rows.scale;
    out.scale[r].bias = rows.bias == nullptr || r >= count ? 0.0f : rows.bias[source] * rows.scale;
    out.scale[r].softcap = rows.softcap;
  }
  if (!table.coded()) {
    out.floats = hwy::AllocateAligned<float>(2 * size);
    for (size_t i = 0; i < size; i++) {
      out.floats[i] = q[i];
      out.floats[size + i] = q[i ^ 8];
    }
    return;
  }
  out.pairs = hwy::AllocateAligned<int32_t>(size / 2);
  const int bits = KernelBits(table.bits);
  const TagF32 f32;
  auto words = hwy::AllocateAligned<int32_t>(static_cast<size_t>(dim));
  for (int r = 0; r < kRows; r++) {
    const float* row = q.data() + static_cast<size_t>(r * dim);
    VecF32 sizes = hn::Zero(f32);
    for (int d = 0; d < dim; d += kLanes) sizes = hn::Max(sizes, hn::Abs(hn::LoadU(f32, row + d)));
    const float largest = hn::GetLane(hn::MaxOfLanes(f32, sizes));
    const VecF32 to_int = hn::Set(f32, largest > 0 ? 32767.0f / largest : 0.0f);
    out.scale[r].factor *= largest / 32767.0f * table.unit;
    for (int d = 0; d < dim; d += kLanes)
      hn::Store(hn::NearestInt(hn::Mul(hn::LoadU(f32, row + d), to_int)), TagI32(), words.get() + d);
    for (int octet = 0; octet < dim / 8; octet++)
      for (int pair = 0; pair < 4; pair++) {
        const auto first_word = static_cast<uint32_t>(words[8 * octet + PairFirst(bits, pair)]),
                   second_word = static_cast<uint32_t>(words[8 * octet + PairSecond(bits, pair)]);
        out.pairs[static_cast<size_t>((octet * 4 + pair) * kRows + r)] =
            static_cast<int32_t>((first_word & 0xffffu) | second_word << 16);
      }
    const int32_t offset = bits == 4 ? LevelDots<4>::kOffset : LevelDots<8>::kOffset;
    for (int quad = 0; offset != 0 && quad < dim / 32; quad++) {
      int32_t sum = 0;
      for (int d = 0; d < 32; d++) sum += words[static_cast<size_t>(32 * quad + d)];
      out.starts[quad / (table.group / 32) * kRows + r] -= offset * sum;
    }
  }
}

// Planes of 2 and 3 bits are turned into planes of 4 bits first and take the kernels of 4 bits, whose level
// tables ignore the bits above a code; planes of 5 bits become levels of 8 bits. It is faster than decoding
// inside the products, whose code would not fit the caches for it.
using WidePlane = uint8_t[64 * 512];  // 8 bits at the largest head dim

template <int kBits, int kPhase>
HWY_INLINE void ExpandQuad(const uint8_t* codes, int quad, uint8_t* HWY_RESTRICT out) {
  KVTIDE_UNROLL
  for (int at = 0; at < 512; at += kLanes * 4)
    hn::Store(Unpacker<kBits>::template LoadNibbles<kPhase>(codes + at, quad), TagU32(),
              reinterpret_cast<uint32_t*>(out + quad * 512 + at));
}

template <int kBits>
HWY_NOINLINE void ExpandPlane(const uint8_t* codes, int dim, uint8_t* HWY_RESTRICT out) {
  const int quads = dim / 16;  // always an even number
  for (int quad = 0; quad < quads; quad += 2) {
    if (kBits == 2 || quad % 4 == 0) {
      ExpandQuad<kBits, 0>(codes, quad, out);
      ExpandQuad<kBits, 1>(codes, quad + 1, out);
    } else {
      ExpandQuad<kBits, kBits == 3 ? 2 : 0>(codes, quad, out);
      ExpandQuad<kBits, kBits == 3 ? 3 : 1>(codes, quad + 1, out);
    }
  }
}

// Levels of 5-bit codes, one in each byte.
class FiveBitLevels {
 public:
  HWY_INLINE explicit FiveBitLevels(const CodeTable& table) {
#if HWY_TARGET == HWY_AVX2
    low_ = hn::LoadDup128(TagI8(), table.low);
    high_ = hn::LoadDup128(TagI8(), table.high);
#else
    alignas(64) int8_t levels[64];
    for (int i = 0; i < 64; i++) levels[i] = i % 32 < 16 ? table.low[i % 16] : table.high[i % 16];
    levels_ = hn::Load(TagI8(), levels);
#endif
  }
  HWY_INLINE VecI8 Of(VecU32 codes) const {
#if HWY_TARGET == HWY_AVX2
    const VecI8 index = hn::BitCast(TagI8(), codes);  // the shuffle ignores bit 4
    return hn::IfThenElse(hn::Gt(index, hn::Set(TagI8(), 15)), hn::TableLookupBytes(high_, index),
                          hn::TableLookupBytes(low_, index));
#else
    return VecI8{_mm512_permutexvar_epi8(codes.raw, levels_.raw)};
#endif
  }

 private:
#if HWY_TARGET == HWY_AVX2
  VecI8 low_, high_;
#else
  VecI8 levels_;
#endif
};

template <int kPhase>
HWY_INLINE void ExpandFives(const FiveBitLevels& levels, const uint8_t* codes, int quad,
                            uint8_t* HWY_RESTRICT out) {
  const TagU32 u32;
  const VecU32 nibble = hn::Set(u32, 0x0f0f0f0fu), fifth = hn::Set(u32, 0x10101010u);
  KVTIDE_UNROLL
  for (int at = 0; at < 512; at += kLanes * 4) {
    const Units units = Unpacker<5>::LoadFives<kPhase>(codes + at, quad);
    const VecI8 even = levels.Of(hn::Or(hn::And(units.a, nibble), hn::And(hn::ShiftLeft<4>(units.b), fifth)));
    const VecI8 odd = levels.Of(hn::Or(hn::And(hn::ShiftRight<4>(units.a), nibble), hn::And(units.b, fifth)));
    auto* target = reinterpret_cast<int8_t*>(out + quad * 1024 + at);
    hn::Store(hn::InterleaveLower(TagI8(), even, odd), TagI8(), target);
    hn::Store(hn::InterleaveUpper(TagI8(), even, odd), TagI8(), target + 512);
  }
}

HWY_NOINLINE void ExpandFivesPlane(const CodeTable& table, const uint8_t* codes, int dim,
                                   uint8_t* HWY_RESTRICT out) {
  const FiveBitLevels levels(table);
  const int quads = dim / 16;  // always an even number
  for (int quad = 0; quad < quads; quad += 2) {
    if (quad % 4 == 0) {
      ExpandFives<0>(levels, codes, quad, out);
      ExpandFives<1>(levels, codes, quad + 1, out);
    } else {
      ExpandFives<2>(levels, codes, quad, out);
      ExpandFives<3>(levels, codes, quad + 1, out);
    }
  }
}

// The view of a half whose codes have a width with a kernel, with `plane` as the place for them.
HWY_INLINE HalfView Widened(const HalfView& half, WidePlane& plane) {
  HalfView view = half;
  switch (half.table->bits) {
    case 2:
      ExpandPlane<2>(half.codes, half.dim, plane);
      break;
    case 3:
      ExpandPlane<3>(half.codes, half.dim, plane);
      break;
    case 5:
      ExpandFivesPlane(*half.table, half.codes, half.dim, plane);
      break;
    default:
      return view;
  }
  view.codes = plane;
  return view;
}

template <int kRows>
HWY_INLINE void PageDots(const HalfView& k, const PreparedRows<kRows>& rows, float* dots) {
  if (!k.table->coded()) {
    const float* swapped = rows.floats.get() + kRows * k.dim;
    return k.table->bf16 ? KeyDotsHalf<kRows, true>(k, rows.floats.get(), swapped, dots)
                         : KeyDotsHalf<kRows, false>(k, rows.floats.get(), swapped, dots);
  }
  HWY_ALIGN WidePlane plane;
  const HalfView wide = Widened(k, plane);
  return KernelBits(k.table->bits) == 4 ? KeyDots<4, kRows>(wide, rows.pairs.get(), rows.starts, dots)
                                        : KeyDots<8, kRows>(wide, rows.pairs.get(), rows.starts, dots);
}

template <int kRows>
HWY_INLINE void PageSums(const HalfView& v, float* weights, const PageFactors* page, int first, int last,
                         float* out) {
  if (!v.table->coded()) {
    return v.table->bf16 ? ValueSumsHalf<kRows, true>(v, weights, page, first, last, out)
                         : ValueSumsHalf<kRows, false>(v, weights, page, first, last, out);
  }
  HWY_ALIGN WidePlane plane;
  const HalfView wide = Widened(v, plane);
  return KernelBits(v.table->bits) == 4 ? ValueSums<4, kRows>(wide, weights, page, out)
                                        : ValueSums<8, kRows>(wide, weights, page, out);
}

template <int kRows>
void AttendRows(const PageSegment& segment, const QueryRows& rows, int first_row, float* out, float* lse) {
  const CodeTable &k_table = *segment.k.table, &v_table = *segment.v.table;
  const int dim_k = segment.k.dim, dim_v = segment.v.dim;
  PreparedRows<kRows> prepared;
  PrepareRows<kRows>(rows, first_row, k_table, dim_k, prepared);
  auto sums = hwy::AllocateAligned<float>(static_cast<size_t>(kRows * dim_v));
  std::fill_n(sums.get(), kRows * dim_v, 0.0f);
  RowStates states;
  Prefetcher prefetch;
  const size_t record_bytes = segment.record_bytes;
  // Steps of work on a page, from below.
  const int key_steps = k_table.coded() ? dim_k / 8 * std::max(1, kPageVectors / VectorsFor(kRows)) : 16;
  const int value_steps = (v_table.coded() ? 8 : kWide ? 32 : 16) * std::max(1, dim_v / kLanes / 4);
  prefetch.lines = static_cast<int>(record_bytes / 64) / (key_steps + value_steps) + 1;
  HalfView k{&k_table, dim_k, segment.k.groups, nullptr, nullptr, &prefetch};
  HalfView v{&v_table, dim_v, segment.v.groups, nullptr, nullptr, &prefetch};
  alignas(64) float dots[kRows * kBlockTokens];
  constexpr size_t kAhead = 2;  // pages
  for (size_t b = 0; b < segment.blocks.size(); b++) {
    const int64_t position = segment.first_position + static_cast<int64_t>(b) * kBlockTokens;
    const int64_t valid = std::min<int64_t>(kBlockTokens, segment.first_position + segment.tokens - position);
    int first[kRows], last[kRows], page_first = kBlockTokens, page_last = 0;
    for (int r = 0; r < kRows; r++) {
      first[r] = static_cast<int>(std::clamp<int64_t>(prepared.begin[r] - position, 0, kBlockTokens));
      last[r] = static_cast<int>(std::clamp<int64_t>(prepared.end[r] - position, 0, valid));
      if (first[r] >= last[r]) continue;
      page_first = std::min(page_first, first[r]);
      page_last = std::max(page_last, last[r]);
    }
    if (page_first >= page_last) continue;
    const auto* record = reinterpret_cast<const uint8_t*>(segment.blocks[b] + segment.record_offset);
    if (b + kAhead < segment.blocks.size()) {
      prefetch.next = reinterpret_cast<const uint8_t*>(segment.blocks[b + kAhead] + segment.record_offset);
      prefetch.end = prefetch.next + record_bytes;
    } else {
      prefetch.end = prefetch.next;
    }
    k.codes = record;
    k.scales = record + segment.k.scales;
    v.codes = record + segment.v.codes;
    v.scales = record + segment.v.scales;
    PageDots<kRows>(k, prepared, dots);
    PageFactors page[kRows];
    SoftmaxPage<kRows>(dots, prepared.scale, first, last, states, page);
    PageSums<kRows>(v, dots, page, page_first, page_last, sums.get());
  }
  const int count = std::min(kRows, rows.rows - first_row);
  for (int r = 0; r < count; r++)
    FinishRow(sums.get() + r * dim_v, states.Row(r), v_table.coded(), dim_v,
              out + static_cast<size_t>(first_row + r) * static_cast<size_t>(dim_v), lse + first_row + r);
}

inline void AttendFewRows(const PageSegment& segment, const QueryRows& rows, float* out, float* lse) {
  for (int row = 0; row < rows.rows;) {
    const int left = rows.rows - row;
    if (left > 4) {
      AttendRows<8>(segment, rows, row, out, lse);
      row += 8;
    } else if (left > 2) {
      AttendRows<4>(segment, rows, row, out, lse);
      row += 4;
    } else if (left == 2) {
      AttendRows<2>(segment, rows, row, out, lse);
      row += 2;
    } else {
      AttendRows<1>(segment, rows, row, out, lse);
      row += 1;
    }
  }
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
