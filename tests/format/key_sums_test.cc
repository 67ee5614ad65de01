// The sums of calibrations: how rows arrive does not matter, and errors are those of the rows' own positions.
#include "kernels/format/key_sums.h"

#include <cmath>
#include <limits>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

constexpr GroupShape kShape{2, 2, 32, 32};
constexpr int kQueryHeads = 4;

Rope SomeRope() {
  Rope rope;
  float frequency = 1;
  for (int i = 0; i < 16; i++, frequency *= 0.6f) rope.frequencies.push_back(frequency);
  return rope;
}

// Rows whose channels differ in strength, turned by their positions.
std::vector<float> Rows(uint32_t seed, int64_t position, int tokens, int heads, float strong = 4) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const Rope rope = SomeRope();
  std::vector<float> rows(static_cast<size_t>(tokens * heads * 32));
  for (int t = 0; t < tokens; t++)
    for (int h = 0; h < heads; h++) {
      float* const row = rows.data() + static_cast<size_t>((t * heads + h) * 32);
      for (int c = 0; c < 32; c++) row[c] = 0.5f + normal(random) * (c % 8 == 1 ? strong : 0.3f);
      TurnKey(rope, position + t, 0, false, row);
    }
  return rows;
}

struct Layer {
  std::vector<float> k, q, held_k, held_q;
};
Layer LayerRows(int layer) {
  const auto seed = static_cast<uint32_t>(10 * layer);
  return {Rows(seed, 64, 300, 2), Rows(seed + 1, 64, 300, 4), Rows(seed + 2, 700, 90, 2),
          Rows(seed + 3, 700, 90, 4)};
}

// All rows, `n` at a time.
KeySums Sums(ThreadPool* pool, int n, std::span<const Rope> ropes) {
  KeySums sums(kShape, kQueryHeads, ropes, pool, n);
  for (int layer = 0; layer < 2; layer++) {
    const Layer rows = LayerRows(layer);
    for (int t = 0; t < 300; t += n) {
      sums.AddKeys(layer, 64 + t, std::min(n, 300 - t), rows.k.data() + t * 64);
      sums.AddQueries(layer, 64 + t, std::min(n, 300 - t), rows.q.data() + t * 128);
    }
    for (int t = 0; t < 90; t += n) {
      sums.HoldBackKeys(layer, 700 + t, std::min(n, 90 - t), rows.held_k.data() + t * 64);
      sums.HoldBackQueries(layer, 700 + t, std::min(n, 90 - t), rows.held_q.data() + t * 128);
    }
  }
  return sums;
}

TEST(KeySumsTest, TheSameRowsGiveTheSameProfileHoweverTheyArrive) {
  ThreadPool one(1), two(2);
  const std::vector<Rope> ropes(2, SomeRope());
  const KeySums whole = Sums(&two, 300, ropes), single = Sums(&one, 1, ropes);
  EXPECT_EQ(whole.keys(1), 300);
  const auto a = whole.MakeProfile(), b = single.MakeProfile();
  ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
  EXPECT_EQ(a->hash, b->hash);
  EXPECT_EQ(whole.Means(1), single.Means(1));
  const auto harms = whole.Measure(*a), others = single.Measure(*b);
  ASSERT_TRUE(harms.ok() && others.ok());
  ASSERT_EQ(harms->size(), 4u);
  for (size_t i = 0; i < harms->size(); i++) {
    EXPECT_EQ((*harms)[i].own, (*others)[i].own);
    EXPECT_EQ((*harms)[i].of_beside, (*others)[i].of_beside);
  }
  std::vector<KeyTypeError> errors;
  EXPECT_TRUE(CompareKeyTypes(*harms, &errors).ok());
  EXPECT_EQ(errors[1].type, "tide3");
  EXPECT_EQ(errors[1].beside, "turbo3");
  EXPECT_LT(errors[1].error, errors[1].beside_error);
}

// Keys held back from here and there have the error that they have beside their neighbours, but for which
// page they share their levels with, which does not matter to these types.
TEST(KeySumsTest, KeysHeldBackFromHereAndThereAreMeasuredAtTheirOwnPositions) {
  ThreadPool pool(1);
  const std::vector<Rope> ropes(2, SomeRope());
  const KeySums whole = Sums(&pool, 300, ropes);
  const Profile profile = whole.MakeProfile().value();
  const std::vector<KeyTypeHarm> expected = whole.Measure(profile).value();
  KeySums scattered(kShape, kQueryHeads, ropes, &pool);
  for (int layer = 0; layer < 2; layer++) {
    const Layer rows = LayerRows(layer);
    scattered.HoldBackQueries(layer, 700, 90, rows.held_q.data());
    for (int i = 0; i < 90; i++) {
      const int t = i * 37 % 90;  // every one of them
      scattered.HoldBackKeys(layer, 700 + t, 1, rows.held_k.data() + t * 64);
    }
  }
  const std::vector<KeyTypeHarm> harms = scattered.Measure(profile).value();
  for (size_t i = 0; i < harms.size(); i++) {
    EXPECT_NEAR(harms[i].own, expected[i].own, 0.02 * expected[i].own) << Name(harms[i].type);
    EXPECT_NEAR(harms[i].of_beside, expected[i].of_beside, 1e-3 * expected[i].of_beside);
    EXPECT_NEAR(harms[i].of_leaving_out, expected[i].of_leaving_out, 1e-6 * expected[i].of_leaving_out);
  }
}

TEST(KeySumsTest, SaysWhatIsMissing) {
  ThreadPool pool(1);
  KeySums sums(kShape, kQueryHeads, {}, &pool);
  EXPECT_EQ(sums.MakeProfile().status().code(), absl::StatusCode::kInvalidArgument);
  const Layer rows = LayerRows(0);
  for (int layer = 0; layer < 2; layer++) {
    sums.AddKeys(layer, 64, 300, rows.k.data());
    sums.AddQueries(layer, 64, 300, rows.q.data());
  }
  const auto profile = sums.MakeProfile();
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_THAT(std::string(sums.Measure(*profile).status().message()), testing::HasSubstr("held back"));
  // A type that is no better than one of the same bits, and errors that are no numbers.
  std::vector<KeyTypeError> errors;
  for (const double own : {2.0, std::numeric_limits<double>::quiet_NaN()}) {
    const KeyTypeHarm harm{*ParseCacheType("tide3"), *ParseCacheType("turbo3"), own, 2.0, 10.0};
    EXPECT_THAT(std::string(CompareKeyTypes({&harm, 1}, &errors).message()), testing::HasSubstr("tide3"));
  }
  const KeyTypeHarm lowest{*ParseCacheType("tide1"), *ParseCacheType("turbo2"), 2.0, 1.0, 10.0};
  EXPECT_TRUE(CompareKeyTypes({&lowest, 1}, &errors).ok()) << "beside it are twice the bits";
  EXPECT_EQ(errors[0].error, 0.2);
}

TEST(KeySumsTest, BytesOfAnyShapeAreANumber) {
  EXPECT_GT(KeySums::Bytes(kShape, 1024), 4 * 1024 * 32 * 4);
  EXPECT_GT(KeySums::Bytes({1 << 30, 1024, 512, 512}, int64_t{1} << 24), 1e18);
}

}  // namespace
}  // namespace kvtide
