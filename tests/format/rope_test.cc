#include "kernels/format/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace kvtide {
namespace {

TEST(Rope, AnglesAreThoseOfFloat64AtAnyPosition) {
  for (const float frequency : {1.0f, 0.731f, 0.01f, 1e-5f, 2.9f, 0.0f})
    for (const int64_t position :
         {int64_t{0}, int64_t{64}, int64_t{64 * 511}, int64_t{1} << 20, int64_t{1} << 26})
      for (const int token : {0, 1, 17, 63}) {
        const CosSin got = CosSinOf(PhaseOf(PerPosition(frequency), position, token));
        const long double angle =
            static_cast<long double>(frequency) * static_cast<long double>(position + token);
        const double tolerance = 3e-7 + 1e-15 * static_cast<double>(position);
        EXPECT_NEAR(got.cos, static_cast<double>(cosl(angle)), tolerance) << frequency << " " << position;
        EXPECT_NEAR(got.sin, static_cast<double>(sinl(angle)), tolerance) << frequency << " " << position;
      }
}

TEST(Rope, CosineAndSineOfAllPhasesLieOnTheCircle) {
  for (uint64_t phase = 0; phase < uint64_t{1} << 32; phase += 1000003) {
    const CosSin got = CosSinOf(static_cast<uint32_t>(phase));
    const double angle = static_cast<double>(phase) * 0x1p-32 * 2 * M_PI;
    ASSERT_NEAR(got.cos, std::cos(angle), 2e-7) << phase;
    ASSERT_NEAR(got.sin, std::sin(angle), 2e-7) << phase;
  }
}

TEST(Rope, TurnsPairsAndBack) {
  for (const RopePairs pairs : {RopePairs::kHalves, RopePairs::kNeighbours}) {
    const Rope rope{pairs, {1.0f, 0.5f, 0.25f}};
    std::vector<float> row = {1, 2, 3, 4, 5, 6, 7, 8};
    TurnKey(rope, 128, 3, false, row.data());
    const auto cosine = static_cast<float>(std::cos(65.5)), sine = static_cast<float>(std::sin(65.5));
    const bool halves = pairs == RopePairs::kHalves;
    const float a = halves ? 2.0f : 3.0f, b = halves ? 5.0f : 4.0f;  // the second pair
    EXPECT_NEAR(row[halves ? 1 : 2], a * cosine - b * sine, 1e-5f);
    EXPECT_NEAR(row[halves ? 4 : 3], b * cosine + a * sine, 1e-5f);
    EXPECT_EQ(row[6], 7);
    EXPECT_EQ(row[7], 8);
    TurnKey(rope, 128, 3, true, row.data());
    for (int i = 0; i < 8; i++) EXPECT_NEAR(row[static_cast<size_t>(i)], i + 1, 1e-5f);
  }
}

}  // namespace
}  // namespace kvtide
