// Attention of up to 8 rows over pages, for decoding: rows are prepared for K's type, every page gives logits
// (simd_coded_products-inl.h, simd_half_products-inl.h), its softmax (simd_softmax-inl.h) and its share of
// the output. Included once for each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_FEW_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_FEW_ROWS_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_FEW_ROWS_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_FEW_ROWS_INL_H_
#endif

#include <algorithm>

#include "kernels/cpu/page/page_segment.h"
#include "kernels/cpu/page/simd_coded_products-inl.h"
#include "kernels/cpu/page/simd_half_products-inl.h"
#include "kernels/cpu/page/simd_rebuild-inl.h"
#include "kernels/cpu/page/simd_widen-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// Up to kRows rows, prepared for K's type; missing rows are zero queries.
template <int kRows>
struct PreparedRows {
  // f16, bf16, rebuilt keys: [kRows][dim]; for the first two then the same with chunks exchanged.
  hwy::AlignedFreeUniquePtr<float[]> floats;
  hwy::AlignedFreeUniquePtr<int32_t[]> words;  // coded: [dim / 8][4 * kRows], as PutWords puts them
  int32_t starts[kMaxGroups * kRows] = {};     // coded: [group][row], what sums begin with
  LogitScale scale[kRows];
  int64_t begin[kRows], end[kRows];
};

template <int kRows>
void PrepareRows(const QueryRows& rows, int first, const HalfView& k, PreparedRows<kRows>& out) {
  const CodeTable& table = *k.table;
  const int dim = k.dim;
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
  if (!table.coded() || k.rebuilt()) {
    out.floats = hwy::AllocateAligned<float>(2 * size);
    for (size_t i = 0; i < size; i++) {
      out.floats[i] = q[i];
      out.floats[size + i] = q[i ^ 8];
    }
    return;
  }
  out.words = hwy::AllocateAligned<int32_t>(size / 2);
  const int bits = KernelBits(table.bits);
  const TagF32 f32;
  auto words = hwy::AllocateAligned<int32_t>(static_cast<size_t>(dim));
  for (int r = 0; r < kRows; r++) {
    float* const row = q.data() + static_cast<size_t>(r * dim);
    VecF32 sizes = hn::Zero(f32);
    for (int d = 0; d < dim; d += kLanes) sizes = hn::Max(sizes, hn::Abs(hn::LoadU(f32, row + d)));
    float largest = hn::GetLane(hn::MaxOfLanes(f32, sizes));
    if (largest < 0x1p-64f) {  // its inverse might leave f32
      for (int d = 0; d < dim; d++) row[d] *= 0x1p64f;
      largest *= 0x1p64f;
      out.scale[r].factor *= 0x1p-64f;
    }
    const VecF32 to_int = hn::Set(f32, largest > 0 ? kLargestWord / largest : 0.0f);
    out.scale[r].factor *= largest / kLargestWord * table.unit;
    for (int d = 0; d < dim; d += kLanes)
      hn::Store(hn::NearestInt(hn::Mul(hn::LoadU(f32, row + d), to_int)), TagI32(), words.get() + d);
    for (int octet = 0; octet < dim / 8; octet++)
      PutWords<kRows>(bits, words.get() + 8 * octet, r, out.words.get() + octet * 4 * kRows);
    const int32_t offset = bits == 4 ? LevelDots<4>::kOffset : LevelDots<8>::kOffset;
    for (int quad = 0; offset != 0 && quad < dim / 32; quad++) {
      int32_t sum = 0;
      for (int d = 0; d < 32; d++) sum += words[static_cast<size_t>(32 * quad + d)];
      out.starts[quad / (table.group / 32) * kRows + r] -= offset * sum;
    }
  }
}

// Coefficients of keys that were coded after RoPE, as levels of 8 bits with one scale.
template <int kRows>
HWY_INLINE void CoefficientDots(const HalfView& k, const PreparedRows<kRows>& rows, float* dots) {
  HWY_ALIGN WidePlane plane;
  alignas(64) float gains[kBlockTokens];
  HalfView levels = k;
  levels.dim = CodedQuads(*k.rebuild) * 32;
  ExpandTide(k.rebuild->widths, k.codes, levels.dim, plane);
  levels.codes = plane;
  LoadGains(k.scales, gains);
  KeyDots<8, kRows>(levels, rows.words.get(), rows.starts, gains, dots);
}

template <int kRows>
HWY_INLINE void PageDots(const HalfView& k, const PreparedRows<kRows>& rows, float* tiles, float* dots) {
  if (k.rebuilt()) {
    float* const tile = tiles + k.dim * kBlockTokens;
    RebuildKeys(k, tiles, tile);
    return Product(rows.floats.get(), k.dim, kRows, tile, k.dim, kBlockTokens, nullptr, dots, kBlockTokens);
  }
  if (!k.table->coded()) {
    const float* swapped = rows.floats.get() + kRows * k.dim;
    return k.table->bf16 ? KeyDotsHalf<kRows, true>(k, rows.floats.get(), swapped, dots)
                         : KeyDotsHalf<kRows, false>(k, rows.floats.get(), swapped, dots);
  }
  if (k.table->calibrated) return CoefficientDots<kRows>(k, rows, dots);
  HWY_ALIGN WidePlane plane;
  const HalfView wide = Widened(k, plane);
  alignas(64) float scales[kMaxGroups * kBlockTokens];
  for (int g = 0; g < k.groups; g++) LoadScales(k.scales + g * kBlockTokens * 2, scales + g * kBlockTokens);
  return KernelBits(k.table->bits) == 4
             ? KeyDots<4, kRows>(wide, rows.words.get(), rows.starts, scales, dots)
             : KeyDots<8, kRows>(wide, rows.words.get(), rows.starts, scales, dots);
}

// Steps of the prefetcher in PageDots.
template <int kRows>
int KeySteps(const HalfView& k) {
  if (k.rebuilt()) return 0;
  if (!k.table->coded()) return 16;
  const int quads = k.table->calibrated ? CodedQuads(*k.rebuild) : k.dim / 32;
  return 4 * quads * std::max(1, kPageVectors / VectorsFor(kRows));
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
  HalfView k{&k_table, dim_k, segment.k.groups, nullptr, nullptr, nullptr, &segment.k.rebuild};
  PreparedRows<kRows> prepared;
  PrepareRows<kRows>(rows, first_row, k, prepared);
  auto sums = hwy::AllocateAligned<float>(static_cast<size_t>(kRows * dim_v));
  std::fill_n(sums.get(), kRows * dim_v, 0.0f);
  RowStates states;
  Prefetcher prefetch;
  const size_t record_bytes = segment.record_bytes;
  // Steps of work on a page, from below.
  const int value_steps = (v_table.coded() ? 8 : kWide ? 32 : 16) * std::max(1, dim_v / kLanes / 4);
  prefetch.lines = static_cast<int>(record_bytes / 64) / (KeySteps<kRows>(k) + value_steps) + 1;
  k.prefetch = &prefetch;
  const auto tiles = AllocateScratch(k);
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
    k.position = position;
    PageDots<kRows>(k, prepared, tiles.get(), dots);
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
