#include "kernels/cpu/page/simd_convert.h"

#include <cstring>

#include "kernels/base/finite.h"
#include "kernels/cpu/page/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/page/simd_convert.cc"
// What follows foreach_target.h is compiled once for each instruction set.
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/page/simd_values-inl.h"
// clang-format on

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

void UseConversions(PageKernels& kernels) {
  kernels.widen = Widen;
  kernels.narrow = Narrow;
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace kvtide {

void UseSimdConversions(SimdLevel level, PageKernels& kernels) {
#if HWY_TARGETS & HWY_AVX2
  if (level == SimdLevel::kAvx2) N_AVX2::UseConversions(kernels);
#endif
#if HWY_TARGETS & HWY_AVX3_DL
  if (level == SimdLevel::kAvx512) N_AVX3_DL::UseConversions(kernels);
#endif
#if HWY_TARGETS & KVTIDE_NEON
  if (level == SimdLevel::kNeon) N_NEON::UseConversions(kernels);
#endif
  (void)level;
  (void)kernels;
}

}  // namespace kvtide
#endif  // HWY_ONCE
