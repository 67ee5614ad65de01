#include "kernels/format/e4m3.h"

#include <cmath>
#include <limits>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

// Values of the table in the OCP specification.
TEST(E4m3, HasTheValuesOfTheSpecification) {
  EXPECT_EQ(E4m3ToF32(0x00), 0.0f);
  EXPECT_EQ(E4m3ToF32(0x01), std::ldexp(1.0f, -9));  // smallest subnormal
  EXPECT_EQ(E4m3ToF32(0x07), 0.875f / 64);           // largest subnormal
  EXPECT_EQ(E4m3ToF32(0x08), 1.0f / 64);             // smallest normal
  EXPECT_EQ(E4m3ToF32(0x38), 1.0f);
  EXPECT_EQ(E4m3ToF32(0x7e), 448.0f);
  EXPECT_EQ(E4m3ToF32(0xfe), -448.0f);
  EXPECT_TRUE(std::isnan(E4m3ToF32(0x7f)));
  EXPECT_TRUE(std::isnan(E4m3ToF32(0xff)));
}

TEST(E4m3, EveryCodeComesBack) {
  for (int code = 0; code < 256; ++code) {
    const float value = E4m3ToF32(static_cast<uint8_t>(code));
    if (std::isnan(value)) continue;
    EXPECT_EQ(F32ToE4m3(value), code) << value;
  }
}

// Between two neighbours the nearer one, in the middle the even one.
TEST(E4m3, RoundsToNearestAndTiesToEven) {
  for (int code = 0; code < 0x7e; ++code) {
    const float low = E4m3ToF32(static_cast<uint8_t>(code)), high = E4m3ToF32(static_cast<uint8_t>(code + 1));
    const float middle = (low + high) / 2;
    EXPECT_EQ(F32ToE4m3(middle), code % 2 == 0 ? code : code + 1) << middle;
    EXPECT_EQ(F32ToE4m3(std::nextafter(middle, low)), code) << middle;
    EXPECT_EQ(F32ToE4m3(std::nextafter(middle, high)), code + 1) << middle;
    EXPECT_EQ(F32ToE4m3(-std::nextafter(middle, high)), 0x80 | (code + 1)) << middle;
  }
}

TEST(E4m3, SaturatesAndKeepsNan) {
  for (const float x : {448.0f, 449.0f, 1e30f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(F32ToE4m3(x), 0x7e) << x;
    EXPECT_EQ(F32ToE4m3(-x), 0xfe) << x;
  }
  EXPECT_TRUE(std::isnan(E4m3ToF32(F32ToE4m3(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_EQ(F32ToE4m3(std::numeric_limits<float>::denorm_min()), 0);
}

TEST(E4m3, AScaleMovesTheRange) {
  EXPECT_EQ(RoundToE4m3(1000.0f, 1.0f), 448.0f);
  EXPECT_EQ(RoundToE4m3(896.0f, 2.0f), 896.0f);
  EXPECT_EQ(RoundToE4m3(std::ldexp(1.0f, -12), 1.0f), 0.0f);
  EXPECT_EQ(RoundToE4m3(std::ldexp(1.0f, -12), std::ldexp(1.0f, -4)), std::ldexp(1.0f, -12));
}

}  // namespace
}  // namespace kvtide
