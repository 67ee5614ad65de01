// The instruction sets for which the CPU backend has kernels.
#pragma once

#include <array>
#include <cstdint>

namespace kvtide {

// kBest: the best that this processor has. kAvx512 is that of Ice Lake, Zen 4 and later, with VNNI; kNeon
// that of Neoverse N1, Cortex-A76 and later, with products of bytes (FEAT_DotProd).
enum class SimdLevel : uint8_t { kBest, kPlain, kAvx2, kAvx512, kNeon };
constexpr std::array<SimdLevel, 3> kVectorLevels = {SimdLevel::kAvx2, SimdLevel::kAvx512, SimdLevel::kNeon};

const char* SimdLevelName(SimdLevel level);
// Whether this processor has what kernels of a vector level are compiled for; the build may lack them.
bool ProcessorHas(SimdLevel level);

}  // namespace kvtide
