#include "kernels/cpu/simd_convert.h"

#include <cstring>

#include "kernels/base/finite.h"
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd_convert.cc"
// What follows foreach_target.h is compiled once for each instruction set.
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET
namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kStep = 8;

void Widen(TensorView from, size_t first, size_t count, float* to) {
  if (from.type == DataType::kF32) {
    std::memcpy(to, static_cast<const float*>(from.data) + first, count * sizeof(float));
    return;
  }
  const hn::CappedTag<float, kStep> f32;
  const hn::Rebind<uint16_t, decltype(f32)> u16;
  const hn::Rebind<hwy::float16_t, decltype(f32)> f16;
  const hn::Rebind<uint32_t, decltype(f32)> u32;
  const auto* bits = static_cast<const uint16_t*>(from.data) + first;
  const bool bf16 = from.type == DataType::kBf16;
  size_t i = 0;
  for (; i + kStep <= count; i += kStep)
    hn::StoreU(bf16 ? hn::BitCast(f32, hn::ShiftLeft<16>(hn::PromoteTo(u32, hn::LoadU(u16, bits + i))))
                    : hn::PromoteTo(f32, hn::LoadU(f16, reinterpret_cast<const hwy::float16_t*>(bits + i))),
               f32, to + i);
  for (; i < count; i++) to[i] = from.At(first + i);
}

void Narrow(const float* from, size_t count, MutableTensorView to, size_t first) {
  if (to.type == DataType::kF32) {
    std::memcpy(static_cast<float*>(to.data) + first, from, count * sizeof(float));
    return;
  }
  const hn::CappedTag<float, kStep> f32;
  const hn::Rebind<uint32_t, decltype(f32)> u32;
  const hn::Rebind<uint16_t, decltype(f32)> u16;
  const hn::Rebind<hwy::float16_t, decltype(f32)> f16;
  auto* bits = static_cast<uint16_t*>(to.data) + first;
  const auto largest = hn::Set(f32, kMaxF16), smallest = hn::Set(f32, -kMaxF16);
  size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const auto x = hn::LoadU(f32, from + i);
    if (to.type == DataType::kF16) {
      // The second operand passes when it is NaN.
      const auto bounded = hn::Min(largest, hn::Max(smallest, x));
      hn::StoreU(hn::DemoteTo(f16, bounded), f16, reinterpret_cast<hwy::float16_t*>(bits + i));
    } else {
      const auto b = hn::BitCast(u32, x);
      const auto odd = hn::And(hn::ShiftRight<16>(b), hn::Set(u32, 1));
      const auto rounded = hn::ShiftRight<16>(hn::Add(b, hn::Add(odd, hn::Set(u32, 0x7fff))));
      const auto quiet = hn::Or(hn::ShiftRight<16>(b), hn::Set(u32, 0x40));
      const auto nan = hn::RebindMask(u32, hn::IsNaN(x));
      hn::StoreU(hn::DemoteTo(u16, hn::BitCast(hn::RebindToSigned<decltype(u32)>(),
                                               hn::IfThenElse(nan, quiet, rounded))),
                 u16, bits + i);
    }
  }
  for (; i < count; i++) StoreElement(from[i], to, first + i);
}

void UseConversions(PageKernels& kernels) {
  kernels.widen = Widen;
  kernels.narrow = Narrow;
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "hwy/targets.h"

namespace kvtide {

void UseSimdConversions(SimdLevel level, PageKernels& kernels) {
  const int64_t supported = hwy::SupportedTargets();
#if HWY_TARGETS & HWY_AVX2
  if (level == SimdLevel::kAvx2 && (supported & HWY_AVX2)) N_AVX2::UseConversions(kernels);
#endif
#if HWY_TARGETS & HWY_AVX3_DL
  if (level == SimdLevel::kAvx512 && (supported & HWY_AVX3_DL)) N_AVX3_DL::UseConversions(kernels);
#endif
  (void)level;
  (void)kernels;
  (void)supported;
}

}  // namespace kvtide
#endif  // HWY_ONCE
