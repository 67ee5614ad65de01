#include "kernels/base/sizes.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace kvtide {
namespace {

// Every pair of bytes, against arithmetic in int.
TEST(Sizes, AgreeWithWiderArithmetic) {
  for (int a = -128; a < 128; a++)
    for (int b = -128; b < 128; b++) {
      const auto x = static_cast<int8_t>(a), y = static_cast<int8_t>(b);
      const auto fits = [](int n) { return n >= -128 && n <= 127; };
      const auto bound = [](int n) { return n < -128 ? -128 : n > 127 ? 127 : n; };
      EXPECT_EQ(CheckedAdd(x, y).has_value(), fits(a + b));
      EXPECT_EQ(CheckedMul(x, y).has_value(), fits(a * b));
      EXPECT_EQ(CheckedAdd(x, y).value_or(0), fits(a + b) ? a + b : 0);
      EXPECT_EQ(CheckedMul(x, y).value_or(0), fits(a * b) ? a * b : 0);
      EXPECT_EQ(SaturatingAdd(x, y), bound(a + b));
      EXPECT_EQ(SaturatingMul(x, y), bound(a * b)) << a << " * " << b;
    }
}

TEST(Sizes, ProductsOfManyFactors) {
  EXPECT_EQ(CheckedProduct<size_t>(), 1u);
  EXPECT_EQ(CheckedProduct<size_t>(3, int64_t{5}, 7u), 105u);
  EXPECT_EQ(CheckedProduct<size_t>(int64_t{1} << 40, int64_t{1} << 40), std::nullopt);
  EXPECT_EQ(CheckedProduct<size_t>(-1, 5), std::nullopt);
  EXPECT_EQ(CheckedProduct<int32_t>(1 << 15, 1 << 15), 1 << 30);
  EXPECT_EQ(CheckedProduct<int32_t>(1 << 16, 1 << 15), std::nullopt);
  EXPECT_EQ(CheckedProduct<int64_t>(0, int64_t{1} << 62), 0);
}

TEST(Sizes, RoundUp) {
  EXPECT_EQ(DivideUp(0, 64), 0);
  EXPECT_EQ(DivideUp(1, 64), 1);
  EXPECT_EQ(DivideUp(64, 64), 1);
  EXPECT_EQ(DivideUp(INT64_MAX, 64), INT64_MAX / 64 + 1);
  EXPECT_EQ(RoundUp(65, 64), 128);
  EXPECT_EQ(RoundUp(size_t{128}, 64), 128u);
}

}  // namespace
}  // namespace kvtide
