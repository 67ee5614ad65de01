// Keys of calibrated types (tide.h): from bit planes to levels of 8 bits, in the order of an 8-bit key plane,
// so that the kernels of 8 bits do the rest, and from bytes to gains. Included once for each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_TIDE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_TIDE_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_TIDE_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_TIDE_INL_H_
#endif

#include <array>

#include "kernels/cpu/page/simd_page-inl.h"
#include "kernels/format/tide.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// The levels of all codes of a width as bytes.
using TideTable = std::array<int8_t, 64>;
constexpr std::array<TideTable, kMostTideWidth + 1> MakeTideTables() {
  std::array<TideTable, kMostTideWidth + 1> tables{};
  for (int width = 1; width <= kMostTideWidth; width++)
    for (int code = 0; code < 1 << width; code++)
      tables[static_cast<size_t>(width)][static_cast<size_t>(code)] =
          static_cast<int8_t>(TideLevel(width, code));
  return tables;
}
alignas(64) inline constexpr std::array<TideTable, kMostTideWidth + 1> kTideTables = MakeTideTables();

// Levels of a vector of codes from kWidth bit planes; bit e of the vector's piece of a plane, a bit for each
// byte, is of code e.
template <int kWidth>
HWY_INLINE VecI8 TideLevels(const uint8_t* bits) {
  VecU8 codes = hn::Zero(TagU8());
  KVTIDE_UNROLL
  for (int b = 0; b < kWidth; b++)
    codes = AddWhereSet(codes, bits + b * kTideUnitBytes, static_cast<uint8_t>(1 << b));
  const ByteTable<kWidth <= 4 ? 16 : 1 << kWidth> levels(kTideTables[kWidth].data());
  return levels.Of(hn::BitCast(TagI8(), codes));
}

// One group of 8 coefficients: 4 runs of 128 bytes, `run_bytes` being how far the tokens' halves lie apart.
template <int kWidth>
HWY_INLINE void ExpandTideGroup(const uint8_t* units, size_t half_bytes, uint8_t* HWY_RESTRICT out) {
  constexpr int kBytes = HWY_MAX_BYTES;
  for (size_t half = 0; half < 2; half++)
    for (size_t slot = 0; slot < 2; slot++) {
      auto* target = reinterpret_cast<int8_t*>(out + half * half_bytes + slot * 512);
      KVTIDE_UNROLL
      for (int at = 0; at < 128; at += kBytes) {
        VecI8 levels = hn::Zero(TagI8());
        if constexpr (kWidth > 0) levels = TideLevels<kWidth>(units + half * 32 + slot * 16 + at / 8);
        hn::Store(levels, TagI8(), target + at);
      }
    }
}

// The plane of a head with these widths as one of 8-bit levels, [dim / 32][2] quads of 1024 bytes.
HWY_NOINLINE inline void ExpandTide(const uint8_t* widths, const uint8_t* codes, int dim,
                                    uint8_t* HWY_RESTRICT out) {
  const size_t half_bytes = static_cast<size_t>(dim) * 32;
  for (int g = 0; g < dim / kTideGroup; g++) {
    uint8_t* target = out + g / 4 * 1024 + g % 4 * 128;
    switch (widths[g]) {
      case 0:
        ExpandTideGroup<0>(codes, half_bytes, target);
        break;
      case 1:
        ExpandTideGroup<1>(codes, half_bytes, target);
        break;
      case 2:
        ExpandTideGroup<2>(codes, half_bytes, target);
        break;
      case 3:
        ExpandTideGroup<3>(codes, half_bytes, target);
        break;
      case 4:
        ExpandTideGroup<4>(codes, half_bytes, target);
        break;
      case 5:
        ExpandTideGroup<5>(codes, half_bytes, target);
        break;
      default:
        ExpandTideGroup<6>(codes, half_bytes, target);
        break;
    }
    codes += widths[g] * kTideUnitBytes;
  }
}

// All gains, which a table of 256 holds.
inline const float* TideGains() {
  static const std::array<float, 256> kGains = [] {
    std::array<float, 256> gains{};
    for (int byte = 0; byte < 256; byte++) gains[static_cast<size_t>(byte)] = TideGain(byte);
    return gains;
  }();
  return kGains.data();
}

// The 64 gains of a page, at token positions.
HWY_INLINE void LoadGains(const uint8_t* bytes, float* HWY_RESTRICT out) {
  const TagF32 f32;
  const hn::Rebind<uint8_t, TagI32> u8;
  const TokenOrder order;
  const float* gains = TideGains();
  for (int t = 0; t < kBlockTokens; t += TokenOrder::kVectors * kLanes) {
    VecF32 tokens[TokenOrder::kVectors];
    KVTIDE_UNROLL
    for (int i = 0; i < TokenOrder::kVectors; i++)
      tokens[i] = hn::GatherIndex(f32, gains, hn::PromoteTo(TagI32(), hn::LoadU(u8, bytes + t + i * kLanes)));
    order.Store(tokens, out + t);
  }
}

// Coefficients from here on have no bits; those with bits come first but for gaps.
HWY_INLINE int CodedCoefficients(const KeyRebuild& keys) {
  int groups = keys.dim / kTideGroup;
  while (groups > 0 && keys.widths[groups - 1] == 0) groups--;
  return groups * kTideGroup;
}
HWY_INLINE int CodedQuads(const KeyRebuild& keys) { return (CodedCoefficients(keys) + 31) / 32; }

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
