#include "kernels/base/finite.h"

#include <algorithm>
#include <cstdint>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/base/finite.cc"
// What follows foreach_target.h is compiled once for each instruction set.
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Magnitudes of a type are in the order of their bit patterns without the sign, as signed numbers too: the
// largest pattern of a stretch decides.
template <class T>
size_t FirstPatternBeyond(const T* bits, size_t count, T limit) {
  constexpr size_t kStretch = 4096;
  const hn::ScalableTag<T> tag;
  const size_t lanes = hn::Lanes(tag);
  const auto magnitude = hn::Set(tag, static_cast<T>(static_cast<T>(~T{0}) ^ (T{1} << (8 * sizeof(T) - 1))));
  const auto bound = hn::Set(tag, limit);
  for (size_t begin = 0; begin < count; begin += kStretch) {
    const size_t end = std::min(begin + kStretch, count);
    auto largest = hn::Zero(tag), other = hn::Zero(tag);
    size_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      largest = hn::Max(largest, hn::And(hn::LoadU(tag, bits + i), magnitude));
      other = hn::Max(other, hn::And(hn::LoadU(tag, bits + i + lanes), magnitude));
    }
    if (!hn::AllFalse(tag, hn::Gt(hn::Max(largest, other), bound))) i = begin;
    const T mask = hn::GetLane(magnitude);
    for (; i < end; i++)
      if (static_cast<T>(bits[i] & mask) > limit) return i;
  }
  return count;
}

size_t FirstBeyond16(const int16_t* bits, size_t count, int16_t limit) {
  return FirstPatternBeyond(bits, count, limit);
}
size_t FirstBeyond32(const int32_t* bits, size_t count, int32_t limit) {
  return FirstPatternBeyond(bits, count, limit);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtide {

HWY_EXPORT(FirstBeyond16);
HWY_EXPORT(FirstBeyond32);

size_t FirstBeyond(TensorView tensor, size_t count, float largest) {
  if (tensor.type == DataType::kF32)
    return HWY_DYNAMIC_DISPATCH(FirstBeyond32)(static_cast<const int32_t*>(tensor.data), count,
                                               static_cast<int32_t>(FloatBits(largest)));
  // The pattern of the largest value of the type that is not above `largest`.
  uint16_t limit = tensor.type == DataType::kF16 ? F32ToF16(std::min(largest, kMaxF16))
                                                 : static_cast<uint16_t>(FloatBits(largest) >> 16);
  if (tensor.type == DataType::kF16 && F16ToF32(limit) > largest) limit--;
  return HWY_DYNAMIC_DISPATCH(FirstBeyond16)(static_cast<const int16_t*>(tensor.data), count,
                                             static_cast<int16_t>(limit));
}

}  // namespace kvtide
#endif  // HWY_ONCE
