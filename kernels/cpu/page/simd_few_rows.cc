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

namespace kvtide {

AttendPages SimdAttendFew(SimdLevel level) {
#if HWY_TARGETS & HWY_AVX2
  if (level == SimdLevel::kAvx2) return N_AVX2::AttendFewRows;
#endif
#if HWY_TARGETS & HWY_AVX3_DL
  if (level == SimdLevel::kAvx512) return N_AVX3_DL::AttendFewRows;
#endif
#if HWY_TARGETS & KVTIDE_NEON
  if (level == SimdLevel::kNeon) return N_NEON::AttendFewRows;
#endif
  (void)level;
  return nullptr;
}

}  // namespace kvtide
#endif  // HWY_ONCE
