#include "kernels/cpu/page_kernels.h"

#include "kernels/cpu/plain_kernels.h"

namespace kvtide {

std::vector<SimdLevel> SupportedSimdLevels() { return {SimdLevel::kPlain}; }

const PageKernels* FindPageKernels(SimdLevel level) {
  if (level == SimdLevel::kBest) level = SupportedSimdLevels().back();
  return level == SimdLevel::kPlain ? &PlainKernels() : nullptr;
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
    case SimdLevel::kAvx512Vnni:
      return "avx512_vnni";
  }
  return "unknown";
}

}  // namespace kvtide
