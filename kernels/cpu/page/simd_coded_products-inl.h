// Integer products of up to 8 rows with the codes of one page: logits from K, output from V. Codes become
// 16-bit levels once for all rows, and meet 16-bit queries and weights. Included once for each instruction
// set.
//
// K: lane = token, so a dot product over dims needs no sum across lanes. V: lane = dim. The weights of a page
// are 16-bit integers relative to its largest, V scale included: neither a sink elsewhere nor large V of
// tokens without weight can wipe a page out, and rounding cannot carry a weight past 32767 (it is clamped as
// well).
#if defined(KVTIDE_KERNELS_CPU_SIMD_CODED_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_CODED_PRODUCTS_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_CODED_PRODUCTS_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_CODED_PRODUCTS_INL_H_
#endif

#include <algorithm>

#include "kernels/cpu/page/simd_level_dots-inl.h"
#include "kernels/cpu/page/simd_page-inl.h"

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
                          int first, const int32_t* HWY_RESTRICT q, LevelSum (&acc)[kVectors][kRows]) {
  const uint8_t* at[kVectors];
  KVTIDE_UNROLL
  for (int v = 0; v < kVectors; v++) {
    const int vector = first + v, half = vector / kQuadVectors;
    at[v] = codes + ColumnOffset(kColumn, vector % kQuadVectors) + QuadOffset<kBits>(half * quads + quad);
  }
  level_dots.template Add<kColumn % 2 == 1>(
      at,
      [&](int pair, int r, int)
          HWY_ATTR -> const int32_t& { return q[kColumn * 4 * kRows + UnitWord<kRows>(pair, r)]; },
      acc);
}

template <int kBits, int kRows, int kVectors>
HWY_INLINE void KeyQuad(const LevelDots<kBits>& level_dots, const HalfView& k, int quads, int quad, int first,
                        const int32_t* HWY_RESTRICT q, LevelSum (&acc)[kVectors][kRows]) {
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
    LevelSum acc[kVectors][kRows];
    KVTIDE_UNROLL
    for (int v = 0; v < kVectors; v++) KVTIDE_UNROLL
    for (int r = 0; r < kRows; r++)
      acc[v][r] = StartSum(LevelDots<kBits>::kOffset != 0 ? starts[group * kRows + r] : 0);
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
        hn::Store(hn::MulAdd(hn::ConvertTo(TagF32(), Total(acc[v][r])), scale, before), TagF32(), target);
      }
    }
  }
}

// `scales` [groups][64] at token positions.
template <int kBits, int kRows>
HWY_NOINLINE void KeyDots(const HalfView& k, const int32_t* q, const int32_t* starts, const float* scales,
                          float* HWY_RESTRICT dots) {
  const LevelDots<kBits> level_dots(*k.table);
  constexpr int kVectors = VectorsFor(kRows);
  for (int first = 0; first < kPageVectors; first += kVectors)
    KeyVectors<kBits, kRows, kVectors>(level_dots, k, q, starts, scales, first, dots);
}

// ---- V of coded types

// Weights times V scales as 16-bit integers, in packed[group][row][32 words], relative to the largest product
// of the row. factors[row]: what one unit of the integer sums stands for.
constexpr int kPackedWords = kBlockTokens / 2;

// A token's weight times its largest scale, and its scales relative to that one, both as 16-bit fractions:
// then every (row, group) costs one multiplication for two vectors of tokens.
template <int kBits, int kRows>
HWY_INLINE void PackWeights(const HalfView& v, const float* weights, const PageFactors* page,
                            int32_t* HWY_RESTRICT packed, int32_t* HWY_RESTRICT starts,
                            float* HWY_RESTRICT factors) {
  constexpr int kPairs = kPageVectors / 2;
  const TagF32 f32;
  const VecF32 one = hn::Set(f32, 32767.0f), largest_word = hn::Set(f32, kLargestWord);
  alignas(64) float scales[kMaxGroups * kBlockTokens];
  alignas(64) int16_t shares[kMaxGroups * kBlockTokens];  // [group][word]
  VecF32 largest_scale[kPageVectors];
  KVTIDE_UNROLL
  for (int i = 0; i < kPageVectors; i++) largest_scale[i] = hn::Zero(f32);
  for (int g = 0; g < v.groups; g++) {
    LoadScales(v.scales + g * kBlockTokens * 2, scales + g * kBlockTokens);
    KVTIDE_UNROLL
    for (int i = 0; i < kPageVectors; i++) {
      const VecF32 size = hn::Abs(hn::Load(f32, scales + g * kBlockTokens + i * kLanes));
      largest_scale[i] = hn::Max(largest_scale[i], size);
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
      hn::Store(PackWords<kBits>(a, b), TagI16(), shares + g * kBlockTokens + i * kLanes);
    }
  }
  alignas(64) float maximum[kRowLanes] = {}, to_int[kRowLanes];
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++) {
    VecF32 largest = hn::Zero(f32);
    KVTIDE_UNROLL
    for (int i = 0; i < kPageVectors; i++)
      largest =
          hn::Max(largest, hn::Mul(hn::Load(f32, weights + r * kBlockTokens + i * kLanes), largest_scale[i]));
    maximum[r] = hn::GetLane(hn::MaxOfLanes(f32, largest));
  }
  KVTIDE_UNROLL
  for (int i = 0; i < kRowVectors; i++) {
    const VecF32 maxima = hn::Load(f32, maximum + i * kLanes);
    hn::Store(hn::IfThenElseZero(hn::Gt(maxima, hn::Set(f32, 1e-30f)), hn::Div(largest_word, maxima)), f32,
              to_int + i * kLanes);
  }
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++) {
    // The largest word and 32767 of 32768 make one.
    factors[r] = page[r].page * maximum[r] * (v.table->unit * 32768.0f / (kLargestWord * 32767.0f));
    VecF32 scaled[kPageVectors];
    KVTIDE_UNROLL
    for (int i = 0; i < kPageVectors; i++)
      scaled[i] = hn::Mul(hn::Mul(hn::Load(f32, weights + r * kBlockTokens + i * kLanes), largest_scale[i]),
                          hn::Set(f32, to_int[r]));
    VecI16 w[kPairs];
    KVTIDE_UNROLL
    for (int i = 0; i < kPageVectors; i += 2)
      w[i / 2] = PackWords<kBits>(NearestSmallInt(scaled[i]), NearestSmallInt(scaled[i + 1]));
    for (int g = 0; g < v.groups; g++) {
      VecI32 sum = hn::Zero(TagI32());
      KVTIDE_UNROLL
      for (int i = 0; i < kPairs; i++) {
        const VecI16 share = hn::Load(TagI16(), shares + g * kBlockTokens + 2 * i * kLanes);
        const VecI16 words = MulFractions(w[i], share);
        StorePacked(words, packed + (g * kRows + r) * kPackedWords + i * kLanes);
        sum = LevelDots<kBits>::AddToStart(sum, words);
      }
      if constexpr (LevelDots<kBits>::kOffset != 0)
        starts[g * kRows + r] = hn::GetLane(hn::SumOfLanes(TagI32(), sum));
    }
  }
}

template <int kBits, int kRows, int kVectors, int kTokens, int kColumn>
HWY_INLINE void ValueColumn(const LevelDots<kBits>& level_dots, const uint8_t* codes, int first,
                            const int32_t* const* weights, LevelSum (&acc)[kVectors][kRows]) {
  const uint8_t* at[kVectors];
  KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++) {
    const int vector = first + i;
    at[i] = codes + ColumnOffset(kColumn, vector % kQuadVectors) +
            QuadOffset<kBits>(vector / kQuadVectors * 2 + kTokens);
  }
  level_dots.template Add<kColumn % 2 == 1>(
      at,
      [&](int pair, int r, int v) HWY_ATTR -> const int32_t& {
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
  LevelSum acc[kVectors][kRows];
  KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++) KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++)
    acc[i][r] = StartSum(
        LevelDots<kBits>::kOffset != 0 ? starts[(quad_dim + i / kQuadVectors) / per_group * kRows + r] : 0);
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
    hn::Store(hn::MulAdd(hn::ConvertTo(f32, Total(acc[i][r])), factor, kept), f32, target);
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

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
