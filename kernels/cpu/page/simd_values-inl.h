// Values of tensors to f32 and from it. Included once for each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_VALUES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_VALUES_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_VALUES_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_VALUES_INL_H_
#endif

#include <cstring>

#include "kernels/base/data_type.h"
#include "kernels/base/finite.h"
#include "kernels/cpu/page/simd_lanes-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET
using TagValues = hn::CappedTag<float, 8>;
constexpr size_t kValueStep = hn::MaxLanes(TagValues());

HWY_INLINE void Widen(TensorView from, size_t first, size_t count, float* to) {
  if (from.type == DataType::kF32) {
    std::memcpy(to, static_cast<const float*>(from.data) + first, count * sizeof(float));
    return;
  }
  const TagValues f32;
  const hn::Rebind<uint16_t, decltype(f32)> u16;
  const hn::Rebind<hwy::float16_t, decltype(f32)> f16;
  const hn::Rebind<uint32_t, decltype(f32)> u32;
  const auto* bits = static_cast<const uint16_t*>(from.data) + first;
  const bool bf16 = from.type == DataType::kBf16;
  size_t i = 0;
  for (; i + kValueStep <= count; i += kValueStep)
    hn::StoreU(bf16 ? hn::BitCast(f32, hn::ShiftLeft<16>(hn::PromoteTo(u32, hn::LoadU(u16, bits + i))))
                    : hn::PromoteTo(f32, hn::LoadU(f16, reinterpret_cast<const hwy::float16_t*>(bits + i))),
               f32, to + i);
  for (; i < count; i++) to[i] = from.At(first + i);
}

HWY_INLINE void Narrow(const float* from, size_t count, MutableTensorView to, size_t first) {
  if (to.type == DataType::kF32) {
    std::memcpy(static_cast<float*>(to.data) + first, from, count * sizeof(float));
    return;
  }
  const TagValues f32;
  const hn::Rebind<uint32_t, decltype(f32)> u32;
  const hn::Rebind<uint16_t, decltype(f32)> u16;
  const hn::Rebind<hwy::float16_t, decltype(f32)> f16;
  auto* bits = static_cast<uint16_t*>(to.data) + first;
  const auto largest = hn::Set(f32, kMaxF16), smallest = hn::Set(f32, -kMaxF16);
  size_t i = 0;
  for (; i + kValueStep <= count; i += kValueStep) {
    const auto x = hn::LoadU(f32, from + i);
    if (to.type == DataType::kF16) {
      const auto bounded = AtMost(largest, AtLeast(smallest, x));
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

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();

#endif  // include guard of each target
