#include "kernels/format/codebook.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <vector>

#include "kernels/format/wht4.h"

namespace kvtide {
namespace {

double Density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi); }
double Below(double x) { return 0.5 * std::erfc(-x / std::numbers::sqrt2); }

// Mean squared error on N(0,1) of the nearest of +-levels / sigma, by integration in closed form.
double GaussianError(const std::vector<int>& levels, double sigma) {
  double error = 0, low = 0;
  for (size_t i = 0; i < levels.size(); i++) {
    const bool last = i + 1 == levels.size();
    const double x = levels[i] / sigma, high = last ? 40.0 : (levels[i] + levels[i + 1]) / 2.0 / sigma;
    const double mass = Below(high) - Below(low), first = Density(low) - Density(high);
    const double second = mass + low * Density(low) - high * Density(high);
    error += second - 2 * x * first + x * x * mass;
    low = high;
  }
  return 2 * error;
}

template <int kBits>
std::vector<int> Levels() {
  std::vector<int> levels;
  for (int i = 0; i < 1 << (kBits - 1); i++) levels.push_back(Codebook<kBits>::Positive(i));
  return levels;
}

TEST(Codebook, IntegerLevelsLoseAlmostNothingAgainstLloydMax) {
  EXPECT_LT(GaussianError(Levels<2>(), Codebook<2>::kSigma), .1174819 * 1.00001);
  EXPECT_LT(GaussianError(Levels<3>(), Codebook<3>::kSigma), .0345477 * 1.0005);
  EXPECT_LT(GaussianError(Levels<4>(), Codebook<4>::kSigma), .0095007 * 1.0023);
}

TEST(Codebook, NoPairOfIntegersUpTo63IsBetterThanTheTwoBitLevels) {
  const double chosen = GaussianError(Levels<2>(), Codebook<2>::kSigma);
  for (int high = 3; high <= 63; high++)
    for (int low = 1; low < high; low++)
      for (double sigma = high / 1.7; sigma < high / 1.3; sigma *= 1.004)
        ASSERT_GT(GaussianError({low, high}, sigma), chosen * (1 - 1e-6))
            << low << " " << high << " " << sigma;
}

TEST(Codebook, LevelsAscendAreSymmetricAndFitSevenBits) {
  const auto check = [](auto codec) {
    using C = decltype(codec);
    constexpr int kCodes = 1 << C::kBits;
    for (int c = 0; c < kCodes; c++) {
      EXPECT_EQ(C::Level(c), -C::Level(kCodes - 1 - c));
      EXPECT_LE(std::abs(C::Level(c)), 63);
      if (c > 0) {
        EXPECT_LT(C::Level(c - 1), C::Level(c));
      }
    }
  };
  check(CodebookCodec<2, NoRotation>());
  check(CodebookCodec<3, NoRotation>());
  check(CodebookCodec<4, NoRotation>());
}

// All codes are reachable, each from its own level, and the scale of a vector of exact levels is the exact
// one.
TEST(Codebook, VectorsOfExactLevelsComeBackExactly) {
  const auto check = [](auto codec) {
    using C = decltype(codec);
    // Levels in the proportions of a Gaussian, so that the rms is one sigma and every level is its own
    // nearest.
    float y[128];
    std::vector<int> wanted;
    for (int i = 0, c = 0; i < 128; i++) {
      while (c + 1 < 1 << C::kBits &&
             Below((C::Level(c) + C::Level(c + 1)) / 2.0 / C::Book::kSigma) < (i + 0.5) / 128)
        c++;
      y[i] = 0.125f * static_cast<float>(C::Level(c));
      wanted.push_back(c);
    }
    for (const Side side : {Side::kKey, Side::kValue}) {
      uint8_t codes[128];
      const float scale = F16ToF32(C::EncodeGroup(y, 128, side, codes)) * C::kLevelUnit;
      EXPECT_EQ(scale, 0.125f) << C::kBits;
      for (int i = 0; i < 128; i++) EXPECT_EQ(codes[i], wanted[static_cast<size_t>(i)]) << i;
    }
  };
  check(CodebookCodec<2, NoRotation>());
  check(CodebookCodec<3, NoRotation>());
  check(CodebookCodec<4, NoRotation>());
  check(Wht4::Stored());
}

TEST(Codebook, TiesTakeTheLowerCodeAndZeroIsTheLowerOfTheMiddleOnes) {
  using C = CodebookCodec<2, NoRotation>;
  // With +-1 elsewhere the rms is 1 within float, and 0 lies between codes 1 and 2.
  float y[128];
  for (int i = 0; i < 128; i++) y[i] = i % 2 ? 1.0f : -1.0f;
  y[0] = 0.0f;
  uint8_t codes[128];
  C::EncodeGroup(y, 128, Side::kKey, codes);
  EXPECT_EQ(codes[0], 1);
  y[0] = -0.0f;
  C::EncodeGroup(y, 128, Side::kKey, codes);
  EXPECT_EQ(codes[0], 1);
}

}  // namespace
}  // namespace kvtide
