// The instruction sets for which the CPU backend has kernels.
#pragma once

#include <cstdint>

namespace kvtide {

// kBest: the best that this processor has. kAvx512 is that of Ice Lake, Zen 4 and later, with VNNI.
enum class SimdLevel : uint8_t { kBest, kPlain, kAvx2, kAvx512 };
const char* SimdLevelName(SimdLevel level);

}  // namespace kvtide
