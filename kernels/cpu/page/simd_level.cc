#include "kernels/cpu/page/simd_level.h"

#include "kernels/cpu/page/simd_targets.h"
// After the choice of targets.
#include "hwy/targets.h"

#if HWY_ARCH_ARM_A64
#include <sys/auxv.h>
#endif

namespace kvtide {

bool ProcessorHas(SimdLevel level) {
  const int64_t targets = hwy::SupportedTargets();
  switch (level) {
    case SimdLevel::kAvx2:
      return (targets & HWY_AVX2) != 0;
#if HWY_ARCH_X86
    case SimdLevel::kAvx512:  // Highway's AVX3_DL does not promise VNNI.
      return (targets & HWY_AVX3_DL) != 0 && __builtin_cpu_supports("avx512vnni");
#elif HWY_ARCH_ARM_A64
    case SimdLevel::kNeon:  // Nor does its NEON promise products of bytes.
      return (targets & HWY_NEON) != 0 && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    default:
      return false;
  }
}

const char* SimdLevelName(SimdLevel level) {
  switch (level) {
    case SimdLevel::kBest:
      return "best";
    case SimdLevel::kPlain:
      return "plain";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kNeon:
      return "neon";
  }
  return "unknown";
}

}  // namespace kvtide
