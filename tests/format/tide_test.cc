#include "kernels/format/tide.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <set>
#include <vector>

#include "kernels/format/page_codec.h"
#include "kernels/format/tide_codec.h"
#include "kernels/format/tide_maker.h"
#include "tests/format/half_page.h"
#include "tests/format/test_rows.h"
#include "tests/format/test_tide.h"

namespace kvtide {
namespace {

using testing::HasSubstr;

const std::vector<int>& Dims() { return test::HeadDims(); }

double Density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi); }
double Below(double x) { return 0.5 * std::erfc(-x / std::numbers::sqrt2); }

// Mean squared error on N(0,1), in closed form.
double GaussianError(int width) {
  double error = 0, low = 0;
  const int half = 1 << (width - 1);
  for (int i = 0; i < half; i++) {
    const auto level = [&](int at) {
      return static_cast<double>(TidePositive(width, at)) / static_cast<double>(TideSigma(width));
    };
    const double x = level(i), high = i + 1 == half ? 40.0 : (level(i) + level(i + 1)) / 2;
    const double mass = Below(high) - Below(low), first = Density(low) - Density(high);
    const double second = mass + low * Density(low) - high * Density(high);
    error += second - 2 * x * first + x * x * mass;
    low = high;
  }
  return 2 * error;
}

TEST(Tide, LevelsAreThoseOfLloydMaxWithin3Percent) {
  const double best[] = {0, .363380, .117482, .034548, .009501, .002505, .000644};
  for (int width = 1; width <= kMostTideWidth; width++) {
    EXPECT_LT(GaussianError(width), best[width] * (width < 5 ? 1.001 : 1.03)) << width;
    for (int code = 0; code < 1 << width; code++) {
      EXPECT_EQ(TideLevel(width, code), -TideLevel(width, (1 << width) - 1 - code));
      EXPECT_LE(std::abs(TideLevel(width, code)), 127);
      if (code > 0) {
        EXPECT_GT(TideLevel(width, code), TideLevel(width, code - 1));
      }
    }
  }
}

TEST(Tide, CodesAreThoseOfTheNearestLevel) {
  for (int width = 1; width <= kMostTideWidth; width++)
    for (int v = -260; v <= 260; v++) {
      const float value = static_cast<float>(v) / 2;
      int nearest = 0;
      for (int code = 1; code < 1 << width; code++) {
        const float now = std::abs(static_cast<float>(TideLevel(width, code)) - value);
        const float had = std::abs(static_cast<float>(TideLevel(width, nearest)) - value);
        // Ties go to the smaller magnitude, at zero to the negative side.
        if (now < had || (now == had && v < 0)) nearest = code;
      }
      EXPECT_EQ(TideCode(width, value), nearest) << width << " " << value;
    }
}

TEST(Tide, BytesOfAUnitStandInTheOrderOfAnEightBitPlane) {
  for (const int dim : Dims())
    for (int g = 0; g < StoredDim(dim) / kTideGroup; g++) {
      std::set<int> seen;
      for (int t = 0; t < kBlockTokens; t++) {
        const int byte = TideByte(t, g);
        EXPECT_TRUE(seen.insert(byte).second);
        const CodePlace place = KeyPlace(t, kTideGroup * g, StoredDim(dim));
        const size_t plane = LaneWordOffset(place.quad * 8 + 2 * place.unit, place.lane);
        const size_t quads = static_cast<size_t>(StoredDim(dim)) / 32;
        // Halves of 32 tokens, slots of 512 bytes, columns of 128.
        EXPECT_EQ(plane, (static_cast<size_t>(byte / 32) * quads + static_cast<size_t>(g / 4)) * 1024 +
                             static_cast<size_t>(byte / 16 % 2) * 512 + static_cast<size_t>(g % 4) * 128 +
                             static_cast<size_t>(byte % 16) * 8);
      }
      EXPECT_EQ(seen.size(), 64u);
    }
}

TEST(Tide, APageOfATypeHasTheBytesOfTurboWithOneScale) {
  for (const CacheType type : CalibratedTypes()) {
    if (Info(type).bits == 1) {
      for (const int dim : Dims())
        EXPECT_EQ(MakeHalfLayout(type, dim).bytes, static_cast<size_t>(8 * StoredDim(dim))) << "one bit a value";
      continue;
    }
    const CacheType turbo = *ParseCacheType("turbo" + std::to_string(Info(type).bits));
    EXPECT_EQ(MakeHalfLayout(type, 64).bytes, MakeHalfLayout(turbo, 64).bytes);
    EXPECT_EQ(MakeHalfLayout(type, 128).bytes, MakeHalfLayout(turbo, 128).bytes);
    EXPECT_LT(MakeHalfLayout(type, 256).bytes, MakeHalfLayout(turbo, 256).bytes);
  }
}

// Keys of one bit beside the values of fewest bits: 16 bits are 10.24 times as many at head dim 128.
TEST(Tide, TheLowestPairIsTenTimesSmaller) {
  const BlockLayout layout({1, 1, 128, 128}, *ParseCachePair("tide1/turbo2"));
  EXPECT_EQ(layout.BitsPerValue(), 1.5625);
  EXPECT_EQ(BlockLayout({1, 1, 64, 64}, layout.pair()).BitsPerValue(), 1.625);
}

TEST(Tide, GainsAreSixteenSteps) {
  EXPECT_EQ(TideGain(0), 0);
  for (int byte = 1; byte < 256; byte++)
    EXPECT_NEAR(TideGain(byte), std::exp2((byte - 1) / 16.0), 1e-7 * std::exp2((byte - 1) / 16.0)) << byte;
}

TEST(Tide, MoreBitsComeNearer) {
  for (const int dim : Dims()) {
    const HeadProfile head = test::TideHead(dim, 7);
    const std::vector<float> rows = test::BellRows(3, kBlockTokens, dim);
    double before = 0;
    for (const char* name : kTideNames) {
      SCOPED_TRACE(std::string(name) + " d " + std::to_string(dim));
      const CacheType type = *ParseCacheType(name);
      const std::vector<float> decoded =
          test::HalfPage(type, Side::kKey, dim).Encode(rows, kBlockTokens, &head, 640).Decode(&head, 640);
      double error = 0, energy = 0;
      for (size_t at = 0; at < rows.size(); at++) {
        const double e = static_cast<double>(decoded[at] - rows[at]);
        error += e * e;
        energy += static_cast<double>(rows[at] * rows[at]);
      }
      EXPECT_LT(error, (Info(type).bits == 1 ? 1.9 : 1.2) * energy);  // nothing but the mean: 2
      EXPECT_GT(error, before);
      before = error;
    }
  }
}

// A key has the same codes wherever it stands, once RoPE of its place is in it.
TEST(Tide, CodesDoNotDependOnThePlace) {
  for (const uint64_t seed : {6, 7, 8, 9}) {
    const int dim = 64;
    const HeadProfile head = test::TideHead(dim, seed);
    const CacheType type = *ParseCacheType("tide3");
    const std::vector<float> rows = test::BellRows(3, kBlockTokens, dim);
    std::vector<std::vector<float>> decoded;
    for (const int64_t position : {int64_t{0}, int64_t{64 * 31}, int64_t{1} << 20}) {
      std::vector<float> turned = rows;
      for (int t = 0; t < kBlockTokens; t++) TurnKey(head.rope, position, t, false, turned.data() + t * dim);
      std::vector<float> back = test::HalfPage(type, Side::kKey, dim)
                                    .Encode(turned, kBlockTokens, &head, position)
                                    .Decode(&head, position);
      for (int t = 0; t < kBlockTokens; t++) TurnKey(head.rope, position, t, true, back.data() + t * dim);
      decoded.push_back(back);
    }
    int differ = 0;  // values on a border between two codes
    for (size_t i = 0; i < rows.size(); i++)
      differ +=
          std::abs(decoded[1][i] - decoded[0][i]) > 1e-4 || std::abs(decoded[2][i] - decoded[0][i]) > 1e-4;
    EXPECT_LT(differ, 3 * dim) << seed;
  }
}

// Without frequencies the place does not matter at all: keys are coded as they are stored.
TEST(Tide, KeysAfterRopeAreCodedAlikeAtEveryPosition) {
  for (const int dim : Dims()) {
    const HeadProfile head = test::AfterRope(test::TideHead(dim, 7));
    const std::vector<float> rows = test::BellRows(3, kBlockTokens, dim);
    for (const CacheType type : CalibratedTypes()) {
      const test::HalfPage first = test::HalfPage(type, Side::kKey, dim).Encode(rows, 50, &head, 0),
                           later = test::HalfPage(type, Side::kKey, dim).Encode(rows, 50, &head, 64 * 977);
      EXPECT_EQ(first.bytes, later.bytes) << Name(type) << " d " << dim;
      EXPECT_EQ(first.Decode(&head, 0), later.Decode(&head, 64 * 977));
    }
  }
}

// The product of a query with a decoded key is that of the turned query with the levels, and the constant.
TEST(Tide, TurnedQueriesMeetLevelsOfKeysAfterRope) {
  for (const int dim : Dims()) {
    const HeadProfile head = test::AfterRope(test::TideHead(dim, 8));
    const int stored = StoredDim(dim);
    std::vector<float> rows = test::BellRows(3, kBlockTokens, dim);
    for (int i = 0; i < dim; i++) rows[static_cast<size_t>(2 * dim + i)] *= 300;
    const std::vector<float> queries = test::BellRows(4, 5, dim);
    for (const CacheType type : CalibratedTypes()) {
      const test::HalfPage page = test::HalfPage(type, Side::kKey, dim).Encode(rows, 61, &head);
      const std::vector<float> decoded = page.Decode(&head);
      std::vector<float> levels(static_cast<size_t>(kBlockTokens * stored));
      DecodeTideLevels(type, page.layout, head, page.bytes.data(), levels.data());
      for (int q = 0; q < 5; q++) {
        std::vector<float> turned(queries.begin() + q * dim, queries.begin() + (q + 1) * dim);
        turned.resize(static_cast<size_t>(stored));
        const float bias = TurnTideQuery(type, head, stored, turned.data());
        for (int t = 0; t < kBlockTokens; t++) {
          const double product = test::Dot(turned.data(), levels.data() + t * stored, stored) +
                                 static_cast<double>(bias),
                       wanted = test::Dot(queries.data() + q * dim, decoded.data() + t * dim, dim);
          double size = 1;
          for (int i = 0; i < dim; i++)
            size += std::abs(static_cast<double>(queries[static_cast<size_t>(q * dim + i)] *
                                                 decoded[static_cast<size_t>(t * dim + i)]));
          EXPECT_NEAR(product, wanted, 1e-5 * size) << Name(type) << " d " << dim << " token " << t;
        }
      }
    }
  }
}

TEST(Tide, OutliersRaiseTheGainInsteadOfClipping) {
  const int dim = 64;
  HeadProfile head = test::TideHead(dim, 9);
  const CacheType type = *ParseCacheType("tide4");
  std::fill(head.widths.begin(), head.widths.begin() + 8, uint8_t{4});
  std::vector<float> rows = test::BellRows(5, kBlockTokens, dim);
  for (int i = 0; i < dim; i++) rows[static_cast<size_t>(2 * dim + i)] *= 300;
  const test::HalfPage page = test::HalfPage(type, Side::kKey, dim).Encode(rows, 3, &head);
  const auto* gains = reinterpret_cast<const uint8_t*>(page.bytes.data() + page.layout.code_bytes);
  EXPECT_GT(TideGain(gains[2]), 150);
  EXPECT_EQ(gains[3], 0) << "no token, no gain";
  const std::vector<float> decoded = page.Decode(&head);
  double error = 0, energy = 0;
  for (size_t i = 2 * dim; i < 3 * dim; i++) {
    error += std::pow(static_cast<double>(decoded[i] - rows[i]), 2);
    energy += std::pow(static_cast<double>(rows[i]), 2);
  }
  EXPECT_LT(error, 0.03 * energy);
}

TEST(Tide, ProfilesThatDoNotFitAreRefused) {
  const auto message = [](auto change) {
    HeadProfile head = test::TideHead(64, 1);
    change(head);
    return std::string(CompleteTransform(64, head).message());
  };
  EXPECT_EQ(message([](HeadProfile&) {}), "");
  EXPECT_THAT(message([](HeadProfile& h) { h.transform.pop_back(); }), HasSubstr("4095 values"));
  EXPECT_THAT(message([](HeadProfile& h) { h.widths.pop_back(); }), HasSubstr("31 widths"));
  EXPECT_THAT(message([](HeadProfile& h) { h.widths[9] = 7; }), HasSubstr("a width of 7"));
  EXPECT_THAT(message([](HeadProfile& h) { std::fill_n(h.widths.begin() + 16, 8, uint8_t{6}); }),
              HasSubstr("widths of tide2 add up to 48, more than 17"));
  EXPECT_THAT(message([](HeadProfile& h) { std::fill_n(h.widths.begin() + 24, 8, uint8_t{1}); }),
              HasSubstr("widths of tide1 add up to 8, more than 7"));
  EXPECT_THAT(message([](HeadProfile& h) { h.transform[70] = NAN; }), HasSubstr("a value of nan"));
  EXPECT_THAT(message([](HeadProfile& h) { std::fill_n(h.transform.begin() + 64, 64, 0.0f); }),
              HasSubstr("without an inverse"));
  EXPECT_THAT(message([](HeadProfile& h) { h.mean.resize(3); }), HasSubstr("3 means"));
  EXPECT_THAT(message([](HeadProfile& h) { h.centre.pop_back(); }), HasSubstr("63 means of coded keys"));
  EXPECT_THAT(message([](HeadProfile& h) { h.centre[3] = INFINITY; }),
              HasSubstr("a mean of coded keys of inf"));
  EXPECT_THAT(message([](HeadProfile& h) { h.rope.frequencies.resize(33); }), HasSubstr("33 frequencies"));
  EXPECT_THAT(message([](HeadProfile& h) { h.rope.frequencies[0] = -1; }),
              HasSubstr("a frequency of RoPE of -1"));
  HeadProfile padded = test::TideHead(80, 1);
  padded.widths[11] = 1;
  EXPECT_THAT(std::string(CompleteTransform(80, padded).message()), HasSubstr("a width of 1 for group 11"));

  const GroupShape shape{2, 2, 64, 64};
  const CacheType type = *ParseCacheType("tide3"), turbo = *ParseCacheType("turbo3");
  Profile profile = test::TideProfile(shape, 3);
  EXPECT_TRUE(CheckProfileFor(type, shape, &profile).ok());
  EXPECT_TRUE(CheckProfileFor(turbo, shape, nullptr).ok());
  EXPECT_THAT(std::string(CheckProfileFor(type, shape, nullptr).message()), HasSubstr("kvtide calibrate"));
  EXPECT_FALSE(CheckProfileFor(type, {2, 2, 128, 64}, &profile).ok());
  profile.k[3].rope.frequencies.clear();
  EXPECT_THAT(std::string(CheckProfileFor(type, shape, &profile).message()),
              HasSubstr("some heads before RoPE and others after it"));
  const Profile after = test::AfterRope(profile);
  EXPECT_TRUE(CheckProfileFor(type, shape, &after).ok());
  EXPECT_FALSE(after.keys_turned_back());
  EXPECT_NE(after.hash, profile.hash);
  profile.k[3].transform.clear();
  EXPECT_THAT(std::string(CheckProfileFor(type, shape, &profile).message()), HasSubstr("every head"));
}

// Profiles that were made before there was tide1 go on with what they have widths for, under the same hash.
TEST(Tide, OlderProfilesHaveFewerTypes) {
  const GroupShape shape{2, 2, 80, 64};
  Profile profile = test::TideProfile(shape, 3);
  for (HeadProfile& head : profile.k) head.widths.resize(kLeastTideTypes * 12);
  const KeyTransforms transforms = TransformsOf(profile);
  std::vector<float> means;
  for (const HeadProfile& head : profile.k) means.insert(means.end(), head.mean.begin(), head.mean.end());
  const auto again = MakeCalibratedProfile(shape, means, transforms);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->hash, HashProfile(profile));
  for (const CacheType type : CalibratedTypes()) {
    const bool has = Info(type).bits > 1;
    EXPECT_EQ(HasWidthsOf(type, shape, transforms), has);
    const absl::Status status = CheckProfileFor(type, shape, &*again);
    EXPECT_EQ(status.ok(), has) << status;
    if (!has) {
      EXPECT_THAT(std::string(status.message()), HasSubstr("older than the type"));
    }
  }
  profile = *again;
  profile.k[1].widths = test::TideHead(80, 5).widths;
  EXPECT_TRUE(CheckProfileFor(*ParseCacheType("tide2"), shape, &profile).ok());
  EXPECT_FALSE(CheckProfileFor(*ParseCacheType("tide1"), shape, &profile).ok());
}

TEST(Tide, TheHashSeesEveryPartOfAProfile) {
  const Profile profile = test::TideProfile({1, 1, 64, 64}, 3);
  const auto with = [&](auto change) {
    Profile other = profile;
    change(other.k[0]);
    return HashProfile(other);
  };
  EXPECT_EQ(with([](HeadProfile&) {}), profile.hash);
  EXPECT_NE(with([](HeadProfile& h) { h.transform[5] += 1; }), profile.hash);
  EXPECT_NE(with([](HeadProfile& h) { h.inverse[5] += 1; }), profile.hash);
  EXPECT_NE(with([](HeadProfile& h) { h.widths[5]++; }), profile.hash);
  EXPECT_NE(with([](HeadProfile& h) { h.centre[5] += 1; }), profile.hash);
  EXPECT_NE(with([](HeadProfile& h) { h.rope.frequencies[1] += 0.1f; }), profile.hash);
  EXPECT_NE(with([](HeadProfile& h) { h.rope.pairs = RopePairs::kHalves; }), profile.hash);
}

// Keys with a few strong directions, queries that look along others.
std::vector<KeyStatistics> Statistics(int dim, int tokens, std::vector<float>* keys,
                                      std::vector<float>* queries) {
  *keys = test::BellRows(21, tokens, dim);
  *queries = test::BellRows(22, tokens, dim);
  for (int t = 0; t < tokens; t++) {
    float* k = keys->data() + t * dim;
    float* q = queries->data() + t * dim;
    for (int i = 0; i < dim; i++) {
      k[i] = (k[i] + 0.8f * k[(i + 1) % dim]) * (i % 8 == 0 ? 6.0f : 0.5f) + 2;
      q[i] *= i < dim / 2 ? 3.0f : 0.3f;
    }
  }
  const Rope rope = test::TideHead(dim, 4).rope;
  for (int t = 0; t < tokens; t++) {
    TurnKey(rope, t, 0, false, keys->data() + t * dim);
    TurnKey(rope, t, 0, false, queries->data() + t * dim);
  }
  std::vector<KeyStatistics> heads(1, KeyStatistics(dim, rope));
  heads[0].AddKeys(keys->data(), tokens, static_cast<size_t>(dim), 0);
  heads[0].AddQueries(queries->data(), tokens, static_cast<size_t>(dim), 0);
  return heads;
}

TEST(TideMaker, HalvesTheErrorOfLogitsOfTurboAndMore) {
  for (const int dim : {64, 80, 128}) {
    std::vector<float> keys, queries;
    const std::vector<KeyStatistics> heads = Statistics(dim, 1024, &keys, &queries);
    const auto profile = MakeTideProfile({1, 1, dim, dim}, heads);
    ASSERT_TRUE(profile.ok()) << profile.status();
    const HeadProfile& head = profile->k[0];
    for (const CacheType type : CalibratedTypes()) {
      SCOPED_TRACE(std::string(Name(type)) + " d " + std::to_string(dim));
      int sum = 0;
      for (const uint8_t width : WidthsOf(type, head)) sum += width;
      EXPECT_LE(sum, TideUnits(Info(type).bits, StoredDim(dim)));
      const int bits = Info(type).bits;
      const CacheType turbo = *ParseCacheType("turbo" + std::to_string(std::max(2, bits)));
      const auto error = [&](CacheType coded) {
        const std::vector<float> decoded =
            test::HalfPage(coded, Side::kKey, dim).Encode(keys, kBlockTokens, &head, 0).Decode(&head, 0);
        double sum_of_squares = 0;
        for (int t = 0; t < kBlockTokens; t++)
          for (int q = 0; q < 64; q++) {
            const double difference = test::Dot(queries.data() + q * dim, decoded.data() + t * dim, dim) -
                                      test::Dot(queries.data() + q * dim, keys.data() + t * dim, dim);
            sum_of_squares += difference * difference;
          }
        return sum_of_squares;
      };
      EXPECT_LT(error(type), error(turbo) / (bits == 1 ? 1 : 2));  // beside tide1 is twice as much
    }
  }
}

TEST(TideMaker, CoefficientsAreUncorrelatedWithVarianceOne) {
  const int dim = 64, tokens = 2048;
  std::vector<float> keys, queries;
  const auto profile = MakeTideProfile({1, 1, dim, dim}, Statistics(dim, tokens, &keys, &queries));
  ASSERT_TRUE(profile.ok());
  const HeadProfile& head = profile->k[0];
  std::vector<double> z(static_cast<size_t>(tokens * dim));
  for (int t = 0; t < tokens; t++) TurnKey(head.rope, t, 0, true, keys.data() + t * dim);
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < dim; i++)
      for (int j = 0; j < dim; j++)
        z[static_cast<size_t>(t * dim + j)] += static_cast<double>(
            (keys[static_cast<size_t>(t * dim + i)] - head.centre[static_cast<size_t>(i)]) *
            head.transform[static_cast<size_t>(i * dim + j)]);
  for (int a = 0; a < dim; a += 7)
    for (int b = 0; b < dim; b += 5) {
      double sum = 0;
      for (int t = 0; t < tokens; t++)
        sum += z[static_cast<size_t>(t * dim + a)] * z[static_cast<size_t>(t * dim + b)];
      EXPECT_NEAR(sum / tokens, a == b ? 1 : 0, 2e-3) << a << " " << b;
    }
}

TEST(TideMaker, ABudgetTakesTheLeastUsefulBitsAway) {
  std::vector<float> keys, queries;
  const std::vector<KeyStatistics> heads = Statistics(64, 2048, &keys, &queries);
  TideBudget budget;
  budget.units[2] = 9;
  const Profile whole = MakeTideProfile({1, 1, 64, 64}, heads).value(),
                less = MakeTideProfile({1, 1, 64, 64}, heads, budget).value();
  int sum = 0;
  for (size_t i = 0; i < 4 * 8; i++) {
    const uint8_t all = whole.k[0].widths[i], some = less.k[0].widths[i];
    if (i / 8 != 2) {
      EXPECT_EQ(some, all) << i;
    } else {
      EXPECT_LE(some, all) << i;
      sum += some;
    }
  }
  EXPECT_EQ(sum, 9);
  EXPECT_NE(less.hash, whole.hash);
  budget.units[2] = TideUnits(2, 64) + 1;
  EXPECT_THAT(std::string(MakeTideProfile({1, 1, 64, 64}, heads, budget).status().message()),
              HasSubstr("tide2 has room for 1 to 17 bit planes at 64 channels, not for 18"));
}

TEST(TideMaker, SaysWhatIsMissing) {
  std::vector<float> keys, queries;
  std::vector<KeyStatistics> heads = Statistics(64, 200, &keys, &queries);
  EXPECT_THAT(std::string(MakeTideProfile({1, 1, 64, 64}, heads).status().message()),
              HasSubstr("200 keys are too few for a transform of 64 channels: use at least 256 tokens"));
  heads.assign(1, KeyStatistics(64, {}));
  heads[0].AddKeys(Statistics(64, 300, &keys, &queries).empty() ? nullptr : keys.data(), 300, 64, 0);
  EXPECT_THAT(std::string(MakeTideProfile({1, 1, 64, 64}, heads).status().message()),
              HasSubstr("no queries"));
}

TEST(TideMaker, PartsMakeTheProfileAgain) {
  const GroupShape shape{1, 2, 80, 64};
  const Profile profile = test::TideProfile(shape, 4);
  std::vector<float> means;
  for (const HeadProfile& head : profile.k) means.insert(means.end(), head.mean.begin(), head.mean.end());
  KeyTransforms transforms = TransformsOf(profile);
  const auto again = MakeCalibratedProfile(shape, means, transforms);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->hash, profile.hash);
  transforms.widths.pop_back();
  EXPECT_THAT(std::string(MakeCalibratedProfile(shape, means, transforms).status().message()),
              HasSubstr("95 widths and 40 frequencies for 1 layers of 2 heads of 80"));
}

// The metric is the mean over all pairs of tokens of a window, summed one by one.
TEST(TideMaker, TheQueryMetricIsTheMeanOverDistances) {
  const int dim = 32, tokens = 50;
  for (const uint64_t seed : {3, 4, 5}) {
    const Rope rope = test::TideHead(dim, seed).rope;
    std::vector<float> queries = test::BellRows(9, tokens, dim);
    KeyStatistics statistics(dim, rope);
    std::vector<float> turned = queries;
    for (int t = 0; t < tokens; t++) TurnKey(rope, t, 0, false, turned.data() + t * dim);
    statistics.AddQueries(turned.data(), tokens, dim, 0);
    std::vector<double> wanted(dim * dim);
    double weights = 0;
    for (int n = 0; n < tokens; n++) {
      const double weight = tokens - n;
      weights += weight;
      for (int t = 0; t < tokens; t++) {
        std::vector<float> q(queries.begin() + t * dim, queries.begin() + (t + 1) * dim);
        TurnKey(rope, n, 0, false, q.data());
        for (int i = 0; i < dim; i++)
          for (int j = 0; j < dim; j++)
            wanted[static_cast<size_t>(i * dim + j)] += weight * static_cast<double>(q[i] * q[j]) / tokens;
      }
    }
    const std::vector<double> metric = statistics.QueryMetric();
    for (size_t i = 0; i < wanted.size(); i++)
      EXPECT_NEAR(metric[i], wanted[i] / weights, 1e-4) << seed << " " << i;
  }
}

TEST(Tide, KeysOnly) {
  EXPECT_THAT(std::string(ParseCachePair("tide3").status().message()),
              HasSubstr("tide3 codes keys only; write tide3/turbo3"));
  EXPECT_FALSE(ParseCachePair("q8_0/tide2").ok());
  EXPECT_THAT(std::string(ParseCachePair("tide1").status().message()), HasSubstr("write tide1/turbo2"));
  const auto pair = ParseCachePair("tide3/turbo2");
  ASSERT_TRUE(pair.ok());
  EXPECT_EQ(PairName(*pair), "tide3/turbo2");
}

}  // namespace
}  // namespace kvtide
