#include "kernels/format/turbo_prod.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "tests/format/half_page.h"
#include "tests/format/test_rows.h"

namespace kvtide {
namespace {

constexpr int kDim = TurboProd::kDim;

struct DotErrors {
  double bias = 0;      // regression of estimated on true dot products, minus 1
  double variance = 0;  // of the error, for q and k of unit length, times d
};

// Errors of <q, k_hat> for keys of unit variance; `decode` gives k_hat of row k, drawing a new projection per
// row.
template <class F>
DotErrors Measure(F decode, int rows) {
  double both = 0, exact = 0, squares = 0;
  for (int r = 0; r < rows; r++) {
    const std::vector<float> k = test::BellRows(5000 + static_cast<uint64_t>(r), 1, kDim);
    const std::vector<float> noise = test::BellRows(90000 + static_cast<uint64_t>(r), 1, kDim);
    std::vector<float> q(kDim);
    for (size_t i = 0; i < kDim; i++) q[i] = k[i] + noise[i];
    const std::vector<float> decoded = decode(k, r);
    const double truth = test::Dot(q.data(), k.data(), kDim);
    both += truth * test::Dot(q.data(), decoded.data(), kDim);
    exact += truth * truth;
    const double error =
        test::Dot(noise.data(), decoded.data(), kDim) - test::Dot(noise.data(), k.data(), kDim);
    squares += error * error / test::Dot(noise.data(), noise.data(), kDim) /
               test::Dot(k.data(), k.data(), kDim) * kDim;
  }
  return {both / exact - 1, squares / rows};
}

class TurboProdTest : public testing::TestWithParam<int> {};

TEST_P(TurboProdTest, IsUnbiasedWithTheVarianceOfTheory) {
  const int bits = GetParam(), rows = 3000;
  std::vector<TurboProd> coders;
  for (uint64_t seed = 0; seed < 20; seed++) coders.emplace_back(bits, seed);
  const DotErrors prod = Measure(
      [&](const std::vector<float>& k, int r) {
        std::vector<float> decoded(kDim);
        const TurboProd& coder = coders[static_cast<size_t>(r) % coders.size()];
        coder.Decode(coder.Encode(k.data()), decoded.data());
        return decoded;
      },
      rows);
  const double d = bits == 4 ? .03345 : .1151;  // error of the b-1 bits in groups of 128, least squares
  EXPECT_NEAR(prod.bias, 0, 0.01);
  EXPECT_NEAR(prod.variance, std::numbers::pi / 2 * d, 0.08 * std::numbers::pi / 2 * d);

  // turbo's unbiased scale at the same number of bits is about five times better.
  const CacheType turbo = *ParseCacheType(bits == 4 ? "turbo4" : "turbo3");
  test::HalfPage page(turbo, Side::kKey, kDim);
  const DotErrors scale = Measure(
      [&](const std::vector<float>& k, int) {
        std::vector<float> row(64 * kDim);
        std::copy(k.begin(), k.end(), row.begin());
        std::vector<float> decoded = page.Encode(row, 1).Decode();
        decoded.resize(kDim);
        return decoded;
      },
      rows);
  EXPECT_NEAR(scale.bias, 0, 0.002);
  EXPECT_GT(prod.variance / scale.variance, 4.5);
  EXPECT_LT(prod.variance / scale.variance, 6.5);
}

TEST_P(TurboProdTest, ZeroDecodesToZero) {
  const TurboProd coder(GetParam(), 1);
  const std::vector<float> zero(kDim, 0.0f);
  std::vector<float> decoded(kDim, 1.0f);
  coder.Decode(coder.Encode(zero.data()), decoded.data());
  EXPECT_EQ(decoded, zero);
  EXPECT_EQ(coder.BitsPerValue(), GetParam() + 0.25);
}

INSTANTIATE_TEST_SUITE_P(Bits, TurboProdTest, testing::Values(3, 4));

TEST(TurboProdDeathTest, RefusesOtherWidths) { EXPECT_DEATH(TurboProd(2, 0), "turbo-prod of 2 bits"); }

}  // namespace
}  // namespace kvtide
