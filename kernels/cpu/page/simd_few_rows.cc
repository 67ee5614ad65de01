#include <vector>

#include "kernels/cpu/page/simd_attend.h"
#include "kernels/cpu/page/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/page/simd_few_rows.cc"
// What follows foreach_target.h is compiled once for each instruction set.
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/aligned_allocator.h"
#include "hwy/highway.h"
#include "kernels/cpu/page/simd_few_rows-inl.h"
// clang-format on

#if HWY_ONCE
#include "hwy/targets.h"

namespace kvtide {

AttendPages SimdAttendFew(SimdLevel level) {
  const int64_t supported = hwy::SupportedTargets();
#if HWY_TARGETS & HWY_AVX2
  if (level == SimdLevel::kAvx2 && (supported & HWY_AVX2)) return N_AVX2::AttendFewRows;
#endif
#if HWY_TARGETS & HWY_AVX3_DL
  // Highway's AVX3_DL does not promise VNNI.
  if (level == SimdLevel::kAvx512 && (supported & HWY_AVX3_DL) && __builtin_cpu_supports("avx512vnni"))
    return N_AVX3_DL::AttendFewRows;
#endif
  (void)level;
  (void)supported;
  return nullptr;
}

}  // namespace kvtide
#endif  // HWY_ONCE
