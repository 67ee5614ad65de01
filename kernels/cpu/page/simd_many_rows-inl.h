// Attention of many rows over pages, for prefill: a page is decoded once to f32 tiles and met by all rows in
// two blocked matrix products. Rows see contiguous tokens and are ordered by query, so those that see a page
// are neighbours. Included once for each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_MANY_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_MANY_ROWS_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_MANY_ROWS_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_MANY_ROWS_INL_H_
#endif

#include <algorithm>

#include "kernels/cpu/page/page_segment.h"
#include "kernels/cpu/page/simd_decode-inl.h"
#include "kernels/cpu/page/simd_product-inl.h"
#include "kernels/cpu/page/simd_rebuild-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// ---- Decoding to tiles: coded halves in simd_decode-inl.h, f16 and bf16 here.

// [dim][64] from f16 rows; tokens from `valid` on are zeros, their bytes may be anything.
HWY_NOINLINE inline void DecodeKeysHalf(const HalfView& k, int valid, float* HWY_RESTRICT tile) {
  const hn::CappedTag<float, 4> f32;
  const hn::Repartition<double, decltype(f32)> f64;
  alignas(64) float rows[4 * 512];
  for (int position = 0; position < kBlockTokens; position += 4) {
    for (int i = 0; i < 4; i++) {
      const int token = TokenAtPosition(position + i);
      if (token < valid) {
        DecodeRowHalf(k.codes, k.table->bf16, k.dim, token, rows + i * k.dim);
      } else {
        std::fill_n(rows + i * k.dim, k.dim, 0.0f);
      }
    }
    for (int d = 0; d < k.dim; d += 4) {  // a transposed square of 4 x 4
      const auto a = hn::LoadU(f32, rows + d), b = hn::LoadU(f32, rows + k.dim + d);
      const auto c = hn::LoadU(f32, rows + 2 * k.dim + d), e = hn::LoadU(f32, rows + 3 * k.dim + d);
      const auto ab0 = hn::BitCast(f64, hn::InterleaveLower(f32, a, b)),
                 ab1 = hn::BitCast(f64, hn::InterleaveUpper(f32, a, b));
      const auto ce0 = hn::BitCast(f64, hn::InterleaveLower(f32, c, e)),
                 ce1 = hn::BitCast(f64, hn::InterleaveUpper(f32, c, e));
      float* target = tile + d * kBlockTokens + position;
      hn::StoreU(hn::BitCast(f32, hn::InterleaveLower(f64, ab0, ce0)), f32, target);
      hn::StoreU(hn::BitCast(f32, hn::InterleaveUpper(f64, ab0, ce0)), f32, target + kBlockTokens);
      hn::StoreU(hn::BitCast(f32, hn::InterleaveLower(f64, ab1, ce1)), f32, target + 2 * kBlockTokens);
      hn::StoreU(hn::BitCast(f32, hn::InterleaveUpper(f64, ab1, ce1)), f32, target + 3 * kBlockTokens);
    }
  }
}

HWY_NOINLINE inline void DecodeValuesHalf(const HalfView& v, int valid, float* HWY_RESTRICT tile) {
  for (int position = 0; position < kBlockTokens; position++) {
    const int token = TokenAtPosition(position);
    if (token < valid) {
      DecodeRowHalf(v.codes, v.table->bf16, v.dim, token, tile + position * v.dim);
    } else {
      std::fill_n(tile + position * v.dim, v.dim, 0.0f);
    }
  }
}

inline void DecodeKeyTile(const HalfView& k, int valid, float* scratch, float* tile) {
  if (k.rebuilt()) return RebuildKeys(k, scratch, tile);
  if (k.table->calibrated) {
    LoadCoefficients(k, tile);
    return;
  }
  return k.table->coded() ? DecodeCodedKeys(k, tile) : DecodeKeysHalf(k, valid, tile);
}
inline void DecodeValueTile(const HalfView& v, int valid, float* tile) {
  return v.table->coded() ? DecodeCodedValues(v, tile) : DecodeValuesHalf(v, valid, tile);
}

// ---- Rows and pages

inline void AttendManyRows(const PageSegment& segment, const QueryRows& rows, float* out, float* lse) {
  const CodeTable &k_table = *segment.k.table, &v_table = *segment.v.table;
  const int dim_k = segment.k.dim, dim_v = segment.v.dim;
  const size_t count = static_cast<size_t>(rows.rows), width = static_cast<size_t>(dim_v);
  auto k_tile = hwy::AllocateAligned<float>(static_cast<size_t>(dim_k) * kBlockTokens);
  auto v_tile = hwy::AllocateAligned<float>(static_cast<size_t>(dim_v) * kBlockTokens);
  auto sums = hwy::AllocateAligned<float>(count * width);
  auto weights = hwy::AllocateAligned<float>(count * kBlockTokens);
  std::vector<float> keep(count);
  std::vector<RowState> states(count);
  std::fill_n(sums.get(), count * width, 0.0f);
  LogitScale scale;
  scale.factor = rows.scale;
  scale.softcap = rows.softcap;
  HalfView k{&k_table, dim_k, segment.k.groups, nullptr, nullptr, nullptr, &segment.k.rebuild};
  const auto scratch = AllocateScratch(k);
  HalfView v{&v_table, dim_v, segment.v.groups, nullptr, nullptr, nullptr};
  for (size_t b = 0; b < segment.blocks.size(); b++) {
    const int64_t position = segment.first_position + static_cast<int64_t>(b) * kBlockTokens;
    const int valid =
        static_cast<int>(std::min<int64_t>(kBlockTokens, segment.first_position + segment.tokens - position));
    const auto first_token = [&](size_t r) {
      return static_cast<int>(std::clamp<int64_t>(rows.begin[r] - position, 0, kBlockTokens));
    };
    const auto last_token = [&](size_t r) {
      return static_cast<int>(std::clamp<int64_t>(rows.end[r] - position, 0, valid));
    };
    size_t first = 0, last = count;
    while (first < last && first_token(first) >= last_token(first)) first++;
    while (first < last && first_token(last - 1) >= last_token(last - 1)) last--;
    if (first == last) continue;
    const auto* record = reinterpret_cast<const uint8_t*>(segment.blocks[b] + segment.record_offset);
    k.codes = record;
    k.scales = record + segment.k.scales;
    v.codes = record + segment.v.codes;
    v.scales = record + segment.v.scales;
    k.position = position;
    DecodeKeyTile(k, valid, scratch.get(), k_tile.get());
    DecodeValueTile(v, valid, v_tile.get());
    const int seen = static_cast<int>(last - first);
    float* page_weights = weights.get() + first * kBlockTokens;
    Product(rows.q + first * static_cast<size_t>(dim_k), dim_k, seen, k_tile.get(), dim_k, kBlockTokens,
            nullptr, page_weights, kBlockTokens);
    for (size_t r = first; r < last; r++) {
      float* row = weights.get() + r * kBlockTokens;
      scale.bias = rows.bias == nullptr ? 0.0f : rows.bias[r] * rows.scale;
      const int from = first_token(r);
      const PageFactors page = SoftmaxPage(row, scale, from, std::max(from, last_token(r)), states[r]);
      keep[r] = page.keep;
      if (page.page == 1.0f) continue;
      for (int i = 0; i < kPageVectors; i++)
        hn::Store(hn::Mul(hn::Load(TagF32(), row + i * kLanes), hn::Set(TagF32(), page.page)), TagF32(),
                  row + i * kLanes);
    }
    Product(page_weights, kBlockTokens, seen, v_tile.get(), kBlockTokens, dim_v, keep.data() + first,
            sums.get() + first * width, dim_v);
  }
  for (size_t r = 0; r < count; r++)
    FinishRow(sums.get() + r * width, states[r], v_table.coded(), dim_v, out + r * width, lse + r);
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
