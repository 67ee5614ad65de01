// IEEE binary16 and bfloat16 as bit patterns in uint16_t, with round-to-nearest-even conversions that give
// the same bits on CPU and GPU. Overflow goes to infinity; NaN stays NaN (quiet). Bulk code uses the vector
// units instead and has to agree with these functions bit by bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/base/host_device.h"

namespace kvtide {

KVTIDE_HD inline uint32_t FloatBits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

KVTIDE_HD inline float FloatFromBits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

KVTIDE_HD inline float F16ToF32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 31)
    return FloatFromBits(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0));
  if (exponent != 0) return FloatFromBits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  // Subnormal or zero: mantissa * 2^-24 is exact in binary32.
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  return FloatFromBits(sign | FloatBits(magnitude));
}

KVTIDE_HD inline uint16_t F32ToF16(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                                               // subnormal in binary16
    if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);           // below half of the smallest
    const uint32_t shift = 126 - (magnitude >> 23);                            // 14 .. 24
    const uint32_t full = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t kept = full >> shift;
    const uint32_t rest = full & ((1u << shift) - 1), half = 1u << (shift - 1);
    return static_cast<uint16_t>(sign | (kept + ((rest > half || (rest == half && (kept & 1))) ? 1 : 0)));
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

KVTIDE_HD inline float Bf16ToF32(uint16_t b) { return FloatFromBits(static_cast<uint32_t>(b) << 16); }

KVTIDE_HD inline uint16_t F32ToBf16(float x) {
  const uint32_t bits = FloatBits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace kvtide
