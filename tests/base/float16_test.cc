#include "kernels/base/float16.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace kvtide {
namespace {

bool IsNanF16(uint16_t h) { return (h & 0x7c00u) == 0x7c00u && (h & 0x3ffu) != 0; }
bool IsNanBf16(uint16_t h) { return (h & 0x7f80u) == 0x7f80u && (h & 0x7fu) != 0; }

// The value of a binary16 pattern, from the definition of the format.
double ValueOfF16(uint16_t h) {
  const double sign = h & 0x8000u ? -1.0 : 1.0;
  const int exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return sign * std::numeric_limits<double>::infinity();
  return exponent == 0 ? sign * std::ldexp(mantissa, -24) : sign * std::ldexp(1024 + mantissa, exponent - 25);
}

TEST(Float16, EveryPatternHasItsValueAndComesBack) {
  for (uint32_t i = 0; i < 65536; i++) {
    const uint16_t h = static_cast<uint16_t>(i);
    const float x = F16ToF32(h);
    if (IsNanF16(h)) {
      EXPECT_TRUE(std::isnan(x)) << i;
      EXPECT_TRUE(IsNanF16(F32ToF16(x))) << i;
      EXPECT_EQ(F32ToF16(x) & 0x8000u, h & 0x8000u) << i;
    } else {
      ASSERT_EQ(static_cast<double>(x), ValueOfF16(h)) << i;
      ASSERT_EQ(F32ToF16(x), h) << i;
    }
  }
}

TEST(Float16, RoundsToNearestAndToEvenOnTies) {
  // Around the midpoint of every two neighbours, the largest finite value and the first one beyond included.
  for (uint32_t i = 0; i < 0x7c00u; i++) {
    const double low = ValueOfF16(static_cast<uint16_t>(i));
    const double high = i + 1 == 0x7c00u ? 65536.0 : ValueOfF16(static_cast<uint16_t>(i + 1));
    const float middle = static_cast<float>((low + high) / 2);
    ASSERT_EQ(static_cast<double>(middle), (low + high) / 2);
    const uint16_t even = static_cast<uint16_t>(i % 2 == 0 ? i : i + 1);
    for (const float sign : {1.0f, -1.0f}) {
      const uint32_t bit = sign < 0 ? 0x8000u : 0u;
      ASSERT_EQ(F32ToF16(sign * middle), even | bit) << i;
      ASSERT_EQ(F32ToF16(sign * std::nextafter(middle, 0.0f)), i | bit) << i;
      ASSERT_EQ(F32ToF16(sign * std::nextafter(middle, 1e9f)), (i + 1) | bit) << i;
    }
  }
}

TEST(Float16, LimitsOfTheRange) {
  EXPECT_EQ(F32ToF16(65504.0f), 0x7bffu);
  EXPECT_EQ(F32ToF16(65519.996f), 0x7bffu);
  EXPECT_EQ(F32ToF16(65520.0f), 0x7c00u);
  EXPECT_EQ(F32ToF16(std::numeric_limits<float>::max()), 0x7c00u);
  EXPECT_EQ(F32ToF16(-std::numeric_limits<float>::infinity()), 0xfc00u);
  EXPECT_EQ(F32ToF16(std::numeric_limits<float>::denorm_min()), 0u);
  EXPECT_EQ(F32ToF16(-0.0f), 0x8000u);
}

// GCC before 13 knows _Float16 in C++ on x86 alone, and __fp16 on Arm alone.
#if defined(__ARM_FP16_FORMAT_IEEE) && !defined(__clang__)
using CompilersHalf = __fp16;
#define KVTIDE_COMPILER_HAS_HALF
#elif defined(__FLT16_MAX__) && !defined(__clang__)
using CompilersHalf = _Float16;
#define KVTIDE_COMPILER_HAS_HALF
#endif
#ifdef KVTIDE_COMPILER_HAS_HALF
TEST(Float16, AgreesWithTheCompilerOnAStrideOfAllFloats) {
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += 4093) {
    const float x = FloatFromBits(static_cast<uint32_t>(bits));
    if (std::isnan(x)) continue;
    const CompilersHalf h = static_cast<CompilersHalf>(x);
    uint16_t expected;
    std::memcpy(&expected, &h, 2);
    ASSERT_EQ(F32ToF16(x), expected) << bits;
  }
}
#endif

TEST(Bfloat16, EveryPatternComesBack) {
  for (uint32_t i = 0; i < 65536; i++) {
    const uint16_t b = static_cast<uint16_t>(i);
    const float x = Bf16ToF32(b);
    ASSERT_EQ(FloatBits(x), i << 16);
    if (IsNanBf16(b)) {
      EXPECT_TRUE(IsNanBf16(F32ToBf16(x))) << i;
    } else {
      ASSERT_EQ(F32ToBf16(x), b) << i;
    }
  }
}

TEST(Bfloat16, RoundsToNearestAndToEvenOnTies) {
  for (uint32_t i = 0; i < 0x7f80u; i++) {
    const uint32_t middle = (i << 16) | 0x8000u;
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const uint32_t bit = sign >> 16;
      ASSERT_EQ(F32ToBf16(FloatFromBits(sign | middle)), (i % 2 == 0 ? i : i + 1) | bit);
      ASSERT_EQ(F32ToBf16(FloatFromBits(sign | (middle - 1))), i | bit);
      ASSERT_EQ(F32ToBf16(FloatFromBits(sign | (middle + 1))), (i + 1) | bit);
    }
  }
}

TEST(Bfloat16, NanStaysNanEvenWhenItsLowBitsAreLost) {
  EXPECT_TRUE(IsNanBf16(F32ToBf16(FloatFromBits(0x7f800001u))));
  EXPECT_EQ(F32ToBf16(std::numeric_limits<float>::infinity()), 0x7f80u);
  EXPECT_EQ(F32ToBf16(std::numeric_limits<float>::max()), 0x7f80u);
}

}  // namespace
}  // namespace kvtide
