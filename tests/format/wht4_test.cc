#include "kernels/format/wht4.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "kernels/format/page_codec.h"
#include "tests/format/test_rows.h"

namespace kvtide {
namespace {

double Density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi); }
double Below(double x) { return 0.5 * std::erfc(-x / std::numbers::sqrt2); }

// The squared error, for N(0,1), of the nearest of the levels of `positive` (8 of them) over sigma, taken
// times the unbiased scale |y|^2 / <y,c>: E[c^2] / E[yc]^2 - 1.
template <class Positive>
double UnbiasedError(Positive positive, double sigma) {
  double dot = 0, squares = 0, low = 0;
  for (int i = 0; i < 8; i++) {
    const double x = positive(i) / sigma, high = i == 7 ? 40.0 : (positive(i) + positive(i + 1)) / 2 / sigma;
    dot += 2 * x * (Density(low) - Density(high));
    squares += 2 * x * x * (Below(high) - Below(low));
    low = high;
  }
  return squares / (dot * dot) - 1;
}
double Uniform(double sigma) {
  return UnbiasedError([](int i) { return static_cast<double>(UniformBook4::Positive(i)); }, sigma);
}

TEST(Wht4, TheStepIsTheBestOneToThreeParts) {
  const double chosen = Uniform(UniformBook4::kSigma);
  double best = 1, best_sigma = 0;
  for (double sigma = 30; sigma < 80; sigma += 0.01)
    if (const double error = Uniform(sigma); error < best) {
      best = error;
      best_sigma = sigma;
    }
  EXPECT_NEAR(UniformBook4::kStep / best_sigma, 0.3352, 0.0001);
  EXPECT_LT(chosen, best * 1.0004);
  EXPECT_NEAR(chosen, 0.01168, 0.00001);
  const double lloyd_max = UnbiasedError([](int i) { return static_cast<double>(Codebook<4>::Positive(i)); },
                                         static_cast<double>(Codebook<4>::kSigma));
  EXPECT_NEAR(chosen / lloyd_max, 1.21, 0.01);
}

// What decoders without a table do.
TEST(Wht4, ALevelIsANibbleInTheUpperHalfOfAByteWithItsTopBitTurned) {
  for (int code = 0; code < 16; code++)
    EXPECT_EQ(Wht4::Level(code), static_cast<int8_t>(((code << 4) & 0xf0) ^ 0x88)) << code;
}

// Coded vectors keep their dot products, and their error is what the levels promise.
TEST(Wht4, VectorsKeepTheirLengthAndLoseOneInNinety) {
  constexpr int kDim = 128, kVectors = 200;
  double error = 0, energy = 0;
  for (uint64_t seed = 1; seed <= kVectors; seed++) {
    const std::vector<float> x = test::BellRows(seed, 1, kDim);
    std::vector<float> y = x;
    uint8_t codes[kDim];
    uint16_t scale;
    EncodeVector<Wht4>(y.data(), kDim, Side::kKey, codes, &scale);
    for (size_t i = 0; i < kDim; i++)
      y[i] = F16ToF32(scale) * Wht4::kLevelUnit * static_cast<float>(Wht4::Level(codes[i]));
    Hadamard::Inverse(y.data(), kDim);
    const double own = test::Dot(x.data(), x.data(), kDim);
    EXPECT_NEAR(test::Dot(x.data(), y.data(), kDim) / own, 1, 1e-3) << "seed " << seed;
    for (size_t i = 0; i < kDim; i++) error += static_cast<double>((x[i] - y[i]) * (x[i] - y[i]));
    energy += own;
  }
  EXPECT_NEAR(error / energy, 0.0112, 0.0006);
}

}  // namespace
}  // namespace kvtide
