// FP8 E4M3 as in "FP8 Formats for Deep Learning" (arXiv 2209.05433) and the OCP 8-bit floating point
// specification: 4 bits of exponent with bias 7, 3 of mantissa, largest value 448, no infinities. It is what
// vLLM and SGLang store with --kv-cache-dtype fp8. Not a cache type of kvtide: the reference that `kvtide
// eval` measures beside them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/base/float16.h"

namespace kvtide {

constexpr float kLargestE4m3 = 448.0f;

// Rounds to nearest, ties to even; what is larger than 448 becomes 448, as the engines store it. NaN stays
// NaN.
inline uint8_t F32ToE4m3(float x) {
  constexpr int kMantissa = 3, kBias = 7;
  const uint32_t bits = FloatBits(x);
  const auto sign = static_cast<uint8_t>(bits >> 24 & 0x80u);
  const float magnitude = FloatFromBits(bits & 0x7fffffffu);
  if (std::isnan(x)) return sign | 0x7fu;
  if (magnitude >= kLargestE4m3) return sign | 0x7eu;
  // The step between neighbours: 2^-9 below 2^-6, else an eighth of the power of two below.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int power = magnitude > 0 ? std::max(exponent - 1, 1 - kBias) : 1 - kBias;
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, kMantissa - power)));
  // Rounding up to the next power of two carries into the exponent by itself.
  return static_cast<uint8_t>(sign | (steps + (static_cast<uint32_t>(power + kBias - 1) << kMantissa)));
}

inline float E4m3ToF32(uint8_t code) {
  const uint32_t exponent = code >> 3 & 15u, mantissa = code & 7u;
  const float sign = (code & 0x80u) != 0 ? -1.0f : 1.0f;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -9);
  return sign * std::ldexp(static_cast<float>(8 + mantissa), static_cast<int>(exponent) - 10);
}

// What a value is after it was stored with a scale.
inline float RoundToE4m3(float x, float scale) { return E4m3ToF32(F32ToE4m3(x / scale)) * scale; }

}  // namespace kvtide
