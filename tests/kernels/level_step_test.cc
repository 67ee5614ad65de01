// Steps, by which the CUDA encoders find codes, against the comparisons that define them: on borders, beside
// them, at zero and at random.
#include "kernels/cuda/codec/level_step.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/format/turbo.h"
#include "kernels/format/wht4.h"

namespace kvtide::cuda {
namespace {

template <class C>
int DefinedCode(float v) {
  const float magnitude = v < 0 ? -v : v;
  int above = 0;
  for (int m = 0; m + 1 < C::kHalf; m++)
    above += magnitude > 0.5f * static_cast<float>(C::Book::Positive(m) + C::Book::Positive(m + 1)) ? 1 : 0;
  return v > 0 ? C::kHalf + above : C::kHalf - 1 - above;
}

// What rounding up a sum with kMagic gives: products of two floats are exact in a double.
template <class C>
int StepOf(float v) {
  return static_cast<int>(std::ceil(static_cast<double>(v) * static_cast<double>(LevelSteps<C>::kPerUnit)));
}

template <class C>
int CodeOfStep(int step) {
  int code = 0;
  while (code + 1 < 2 * C::kHalf && LevelSteps<C>::FirstStep(code + 1) <= step) code++;
  return code;
}

template <class C>
class LevelStepsTest : public ::testing::Test {
 protected:
  static void Check(float v) {
    EXPECT_EQ(CodeOfStep<C>(StepOf<C>(v)), DefinedCode<C>(v)) << C::kName << " value " << v;
  }
};
using Types = ::testing::Types<Turbo2, Turbo3, Turbo4, Wht4>;
TYPED_TEST_SUITE(LevelStepsTest, Types);

TYPED_TEST(LevelStepsTest, GiveTheDefinedCodesAroundBorders) {
  using C = TypeParam;
  for (int m = 0; m + 1 < C::kHalf; m++) {
    const float border = 0.5f * static_cast<float>(C::Book::Positive(m) + C::Book::Positive(m + 1));
    for (const float sign : {1.0f, -1.0f}) {
      float below = border, above = border;
      for (int ulps = 0; ulps < 100; ulps++) {
        this->Check(sign * below);
        this->Check(sign * above);
        below = std::nextafter(below, 0.0f);
        above = std::nextafter(above, 1000.0f);
      }
    }
  }
  for (const float v : {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-30f, -1e-30f}) this->Check(v);
}

TYPED_TEST(LevelStepsTest, GiveTheDefinedCodesAnywhere) {
  using C = TypeParam;
  std::mt19937 random(20);
  std::normal_distribution<float> normal(0, C::Book::kSigma);
  for (int i = 0; i < 200000; i++) this->Check(normal(random));
  for (int i = -800; i <= 800; i++) this->Check(0.25f * static_cast<float>(i));
}

TYPED_TEST(LevelStepsTest, StayWithinTheTable) {
  using C = TypeParam;
  // A group of 128 whose energy lies in one value.
  const float most = C::Book::kSigma * std::sqrt(128.0f) * 1.00001f;
  EXPECT_LT(StepOf<C>(most), LevelSteps<C>::kSteps);
  EXPECT_GE(StepOf<C>(-most), -LevelSteps<C>::kSteps);
}

}  // namespace
}  // namespace kvtide::cuda
