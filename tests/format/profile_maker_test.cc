#include "kernels/format/profile_maker.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/format/half_page.h"
#include "tests/format/test_rows.h"

namespace kvtide {
namespace {

constexpr int kDim = 128;

// Keys with outlier channels: most channels have rms 1, every 16th has 6, one is silent with its partner, all
// have a mean.
std::vector<float> Keys(uint64_t seed, int tokens, float mean) {
  std::vector<float> rows = test::BellRows(seed, tokens, kDim);
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < kDim; i++) {
      float& x = rows[static_cast<size_t>(t * kDim + i)];
      if (i % 16 == 3) x *= 6;
      x = i % 64 == 9 ? 0.0f : x + mean * static_cast<float>(i % 5 - 2);
    }
  return rows;
}

TEST(ProfileMaker, MeanIsTheChannelMean) {
  const std::vector<float> rows = Keys(1, 64, 1.5f);
  const HeadProfile p = MakeKeyProfile(rows.data(), 64, kDim, kDim, {.mean = true});
  ASSERT_EQ(p.mean.size(), 128u);
  EXPECT_TRUE(p.gain.empty());
  for (size_t i = 0; i < kDim; i++) {
    double sum = 0;
    for (size_t t = 0; t < 64; t++) sum += static_cast<double>(rows[t * kDim + i]);
    EXPECT_NEAR(p.mean[i], sum / 64, 1e-6) << i;
  }
}

TEST(ProfileMaker, FullGainMakesAllPairsOfChannelsEquallyStrong) {
  const std::vector<float> rows = Keys(2, 256, 0.5f);
  for (const RopePairs pairs : {RopePairs::kHalves, RopePairs::kNeighbours, RopePairs::kNone}) {
    const HeadProfile p = MakeKeyProfile(rows.data(), 256, kDim, kDim,
                                         {.mean = true, .equalise = Equalise::kFull, .pairs = pairs});
    double first = -1, before = 0, after = 0;
    for (size_t i = 0; i < kDim; i++) {
      const size_t partner = pairs == RopePairs::kHalves       ? (i + 64) % 128
                             : pairs == RopePairs::kNeighbours ? i ^ 1
                                                               : i;
      EXPECT_EQ(p.gain[i], p.gain[partner]);
      double square = 0;
      for (size_t t = 0; t < 256; t++)
        for (const size_t c : {i, partner}) {
          const double x = static_cast<double>(rows[t * kDim + c] - p.mean[c]);
          square += std::pow(x * static_cast<double>(p.gain[c]), 2);
          before += x * x;
        }
      after += square;
      if (i % 64 == 9 || partner % 64 == 9) continue;
      if (first < 0) first = square;
      EXPECT_NEAR(square / first, 1, 1e-5) << i;
    }
    EXPECT_NEAR(after / before, 1, 0.02) << "the mean energy stays (but for the silent channels)";
  }
}

TEST(ProfileMaker, RootGainIsTheSquareRootOfTheFullOneUpToAFactor) {
  const std::vector<float> rows = Keys(3, 64, 0);
  const HeadProfile full = MakeKeyProfile(rows.data(), 64, kDim, kDim, {.equalise = Equalise::kFull});
  const HeadProfile root = MakeKeyProfile(rows.data(), 64, kDim, kDim, {.equalise = Equalise::kRoot});
  const float factor = root.gain[0] * root.gain[0] / full.gain[0];
  for (size_t i = 0; i < kDim; i++)
    EXPECT_NEAR(root.gain[i] * root.gain[i] / full.gain[i] / factor, 1, 1e-5) << i;
}

TEST(ProfileMaker, KeysWithoutEnergyGiveFiniteGains) {
  const std::vector<float> zero(64 * kDim, 0.0f);
  for (const Equalise equalise : {Equalise::kRoot, Equalise::kFull}) {
    for (const float g : MakeKeyProfile(zero.data(), 64, kDim, kDim, {.equalise = equalise}).gain)
      EXPECT_EQ(g, 1.0f);
    std::vector<float> one = zero;
    one[5] = 3;
    for (const float g : MakeKeyProfile(one.data(), 64, kDim, kDim, {.equalise = equalise}).gain)
      EXPECT_TRUE(std::isfinite(g) && g > 0);
  }
  const std::vector<float> constant(64 * kDim, 2.0f);  // nothing is left after the mean
  for (const float g :
       MakeKeyProfile(constant.data(), 64, kDim, kDim, {.mean = true, .equalise = Equalise::kFull}).gain)
    EXPECT_EQ(g, 1.0f);
}

TEST(ProfileMaker, AProfileCoversAllHeadsInOrderAndIsHashed) {
  const GroupShape shape{2, 2, kDim, 64};
  const std::vector<float> a = Keys(4, 64 * 2, 1), b = Keys(5, 64 * 2, 2);  // [64][2 heads][128]
  const float* keys[2] = {a.data(), b.data()};
  const ProfileOptions options{.mean = true, .equalise = Equalise::kFull};
  const Profile p = MakeProfile(shape, keys, 64, options);
  ASSERT_EQ(p.k.size(), 4u);
  EXPECT_TRUE(p.v.empty());
  EXPECT_EQ(p.key(1, 1), MakeKeyProfile(b.data() + kDim, 64, 2 * kDim, kDim, options));
  EXPECT_EQ(p.hash, HashProfile(p));
  EXPECT_EQ(MakeProfile(shape, keys, 64, options).hash, p.hash);
  EXPECT_NE(MakeProfile(shape, keys, 63, options).hash, p.hash);
}

TEST(ProfileMaker, WithoutOptionsThereIsNoProfile) {
  const std::vector<float> rows = Keys(6, 64, 1);
  const float* keys[1] = {rows.data()};
  const Profile p = MakeProfile({1, 1, kDim, kDim}, keys, 64, {});
  EXPECT_EQ(p.hash, 0u);
  EXPECT_TRUE(p.k.empty());
}

TEST(ProfileMaker, TypesAreEqualisedOnlyBesideExactKeys) {
  const CacheType planar = *ParseCacheType("planar3"), turbo = *ParseCacheType("turbo3");
  EXPECT_EQ(DefaultProfileOptions(planar).equalise, Equalise::kFull);
  EXPECT_FALSE(DefaultProfileOptions(planar).mean);
  EXPECT_EQ(DefaultProfileOptions(planar, false), ProfileOptions());
  EXPECT_EQ(DefaultProfileOptions(turbo), ProfileOptions());
}

// Mean of (logit of the coded key) / (logit of the exact key) for queries that look along the key, and error
// of both.
double LogitShare(CacheType type, const std::vector<float>& rows, const HeadProfile* profile,
                  int channel_period) {
  test::HalfPage page(type, Side::kKey, kDim);
  const std::vector<float> decoded = page.Encode(rows, 64, profile).Decode(profile);
  double both = 0, exact = 0;
  for (int t = 0; t < 64; t++)
    for (int i = 3; i < kDim; i += channel_period) {
      const size_t at = static_cast<size_t>(t * kDim + i);
      both += static_cast<double>(rows[at]) * static_cast<double>(decoded[at]);
      exact += static_cast<double>(rows[at]) * static_cast<double>(rows[at]);
    }
  return both / exact;
}

// The cause of the trouble of these types beside exact keys, and its cure: outlier channels lose part of
// their logits.
TEST(ProfileMaker, EqualisationRestoresTheLogitsOfOutlierChannels) {
  for (const CacheType type : AllCacheTypes()) {
    if (Info(type).keys != Equalise::kFull) continue;
    const std::vector<float> rows = Keys(7, 64, 0), calibration = Keys(8, 64, 0);
    const HeadProfile profile =
        MakeKeyProfile(calibration.data(), 64, kDim, kDim, DefaultProfileOptions(type));
    EXPECT_LT(LogitShare(type, rows, nullptr, 16), Info(type).bits == 3 ? 0.95 : 0.985) << Name(type);
    EXPECT_NEAR(LogitShare(type, rows, &profile, 16), 1, 0.02) << Name(type);
  }
}

}  // namespace
}  // namespace kvtide
