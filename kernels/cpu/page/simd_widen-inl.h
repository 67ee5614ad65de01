// Pages of widths without kernels of their own, turned into ones that have: 2 and 3 bits into 4, 5 bits into
// levels of 8. Included once for each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_WIDEN_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_WIDEN_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_WIDEN_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_WIDEN_INL_H_
#endif

#include "kernels/cpu/page/simd_page-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// The widths that have kernels: pages of other widths are turned into these first.
constexpr int KernelBits(int bits) { return bits <= 4 ? 4 : 8; }

// Planes of 2 and 3 bits are turned into planes of 4 bits first and take the kernels of 4 bits, whose level
// tables ignore the bits above a code; planes of 5 bits become levels of 8 bits. It is faster than decoding
// inside the products, whose code would not fit the caches for it.
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

template <int kPhase>
HWY_INLINE void ExpandFives(const ByteTable<32>& levels, const uint8_t* codes, int quad,
                            uint8_t* HWY_RESTRICT out) {
  const TagU32 u32;
  const VecU32 nibble = hn::Set(u32, 0x0f0f0f0fu), fifth = hn::Set(u32, 0x10101010u);
  KVTIDE_UNROLL
  for (int at = 0; at < 512; at += kLanes * 4) {
    const Units units = Unpacker<5>::LoadFives<kPhase>(codes + at, quad);
    const VecI8 even = levels.Of(
        hn::BitCast(TagI8(), hn::Or(hn::And(units.a, nibble), hn::And(hn::ShiftLeft<4>(units.b), fifth))));
    const VecI8 odd = levels.Of(
        hn::BitCast(TagI8(), hn::Or(hn::And(hn::ShiftRight<4>(units.a), nibble), hn::And(units.b, fifth))));
    auto* target = reinterpret_cast<int8_t*>(out + quad * 1024 + at);
    hn::Store(hn::InterleaveLower(TagI8(), even, odd), TagI8(), target);
    hn::Store(hn::InterleaveUpper(TagI8(), even, odd), TagI8(), target + 512);
  }
}

HWY_NOINLINE void ExpandFivesPlane(const CodeTable& table, const uint8_t* codes, int dim,
                                   uint8_t* HWY_RESTRICT out) {
  const ByteTable<32> levels(table.bytes);
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

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
