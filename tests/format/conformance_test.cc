// What every cache type promises, for every type of the catalogue and every head dim. A new type is tested by
// being in the list.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "tests/format/half_page.h"
#include "tests/format/test_rows.h"

namespace kvtide {
namespace {

using test::BellRows;
using test::Dot;
using test::HalfPage;

class Conformance : public testing::TestWithParam<std::tuple<int, int>> {
 protected:
  CacheType type() const { return static_cast<CacheType>(std::get<0>(GetParam())); }
  int dim() const { return std::get<1>(GetParam()); }
  const CacheTypeInfo& info() const { return Info(type()); }
  bool coded() const { return info().storage == Storage::kCodes; }
  static constexpr Side kSides[2] = {Side::kKey, Side::kValue};
};

// Mean squared error of `decoded` relative to the energy of `rows`.
double RelativeError(const std::vector<float>& rows, const std::vector<float>& decoded) {
  double error = 0, energy = 0;
  for (size_t i = 0; i < rows.size(); i++) {
    error += std::pow(static_cast<double>(rows[i]) - static_cast<double>(decoded[i]), 2);
    energy += std::pow(static_cast<double>(rows[i]), 2);
  }
  return error / energy;
}

// The largest expected relative error on N(0,1): Lloyd-Max times the penalty of integer levels for rotated
// types, the uniform quantisers' own error otherwise. An unbiased scale makes D / (1 - D) of an error D; at 3
// and 4 bits groups of 128 with a scale of their own win that back, at 2 bits they do not.
double ExpectedError(const CacheTypeInfo& info) {
  if (info.storage == Storage::kHalf) return info.name == std::string("f16") ? 1.0e-7 : 3.5e-6;
  if (info.bits == 8) return 2.9e-5;
  if (info.bits == 5) return 1.83e-3;
  if (!info.rotated) return 7.4e-3;
  if (info.name == std::string("wht4")) return .01168;  // uniform levels: wht4_test.cc
  const double lloyd_max[5] = {0, 0, .117482, .034548 * 1.0004, .009501 * 1.0022};
  const double d = lloyd_max[info.bits];
  return info.bits == 2 ? d / (1 - d) : d;
}

TEST_P(Conformance, InverseRotationUndoesForwardAndKeepsLengths) {
  const int d = StoredDim(dim());
  const std::vector<float> rows = BellRows(11, 16, d);
  for (int r = 0; r < 16; r++) {
    std::vector<float> x(rows.begin() + r * d, rows.begin() + (r + 1) * d), original = x;
    RotateForward(type(), x.data(), d);
    EXPECT_NEAR(Dot(x.data(), x.data(), d) / Dot(original.data(), original.data(), d), 1, 2e-6);
    if (info().rotated) {
      EXPECT_NE(x, original);
    }
    RotateInverse(type(), x.data(), d);
    for (int i = 0; i < d; i++)
      ASSERT_NEAR(x[static_cast<size_t>(i)], original[static_cast<size_t>(i)], 4e-6f) << i;
  }
}

TEST_P(Conformance, RotationPreservesDotProducts) {
  const int d = StoredDim(dim());
  std::vector<float> a = BellRows(12, 1, d), b = BellRows(13, 1, d);
  const double before = Dot(a.data(), b.data(), d);
  RotateForward(type(), a.data(), d);
  RotateForward(type(), b.data(), d);
  EXPECT_NEAR(Dot(a.data(), b.data(), d), before, 1e-5 * d);
}

TEST_P(Conformance, ErrorOnGaussianRowsIsThatOfTheory) {
  for (const Side side : kSides) {
    HalfPage page(type(), side, dim());
    std::vector<float> rows, decoded;
    for (uint64_t seed = 0; seed < 8; seed++) {
      const std::vector<float> some = BellRows(100 + seed, 64, dim()), back = page.Encode(some).Decode();
      rows.insert(rows.end(), some.begin(), some.end());
      decoded.insert(decoded.end(), back.begin(), back.end());
    }
    const double error = RelativeError(rows, decoded), expected = ExpectedError(info());
    EXPECT_LT(error, 1.02 * expected) << info().name << " " << test::SideName(side);
    // Far below theory would be a broken test, except where padding takes part of the error.
    EXPECT_GT(error, (StoredDim(dim()) == dim() ? 0.9 : 0.72) * expected - 1e-6)
        << info().name << " " << test::SideName(side);
  }
}

TEST_P(Conformance, CosineFloors) {
  // Of all tokens on average, sqrt(1 - D) and a little below, and of the worst of 64.
  const bool uniform = info().name == std::string("wht4");
  const double means[9] = {0, 0, .938, .982, uniform ? .994 : .9949, .999, 0, 0, .99998},
               worst[9] = {0, 0, .88, .945, .975, .997, 0, 0, .9999};
  for (const Side side : kSides) {
    const std::vector<float> rows = BellRows(21, 64, dim()),
                             decoded = HalfPage(type(), side, dim()).Encode(rows).Decode();
    double mean = 0, lowest = 1;
    for (int t = 0; t < 64; t++) {
      const float *a = &rows[static_cast<size_t>(t * dim())], *b = &decoded[static_cast<size_t>(t * dim())];
      const double cosine = Dot(a, b, dim()) / std::sqrt(Dot(a, a, dim()) * Dot(b, b, dim()));
      mean += cosine / 64;
      lowest = std::min(lowest, cosine);
    }
    EXPECT_GT(mean, coded() ? means[info().bits] : .99999) << info().name << " " << test::SideName(side);
    EXPECT_GT(lowest, coded() ? worst[info().bits] : .99999) << info().name << " " << test::SideName(side);
  }
}

// Coded tokens stand beside exact ones: <q, x_hat> must not be systematically smaller or larger than <q, x>.
TEST_P(Conformance, DotProductsAreUnbiased) {
  for (const Side side : kSides) {
    HalfPage page(type(), side, dim());
    double both = 0, exact = 0;
    for (uint64_t seed = 0; seed < 32; seed++) {
      const std::vector<float> keys = BellRows(300 + seed, 64, dim()),
                               noise = BellRows(900 + seed, 64, dim());
      const std::vector<float> decoded = page.Encode(keys).Decode();
      std::vector<float> q(static_cast<size_t>(dim()));
      for (int t = 0; t < 64; t++) {
        const float *k = &keys[static_cast<size_t>(t * dim())], *n = &noise[static_cast<size_t>(t * dim())];
        for (int i = 0; i < dim(); i++) q[static_cast<size_t>(i)] = k[i] + 0.5f * n[i];
        const double truth = Dot(q.data(), k, dim());
        both += truth * Dot(q.data(), &decoded[static_cast<size_t>(t * dim())], dim());
        exact += truth * truth;
      }
    }
    EXPECT_NEAR(both / exact, 1, 0.002) << info().name << " " << test::SideName(side);
  }
}

// Attention works in the rotated frame: logits from the rotated query, V's inverse once per output.
TEST_P(Conformance, RotatedFrameGivesTheSameAttentionAsDecodedRows) {
  const int d = StoredDim(dim());
  HeadProfile profile;
  test::Random random(5);
  for (int i = 0; i < dim(); i++) {
    profile.mean.push_back(random.Bell());
    profile.gain.push_back(0.25f + static_cast<float>(random.Below(1000)) / 250.0f);
  }
  const std::vector<float> rows = BellRows(31, 64, dim()), queries = BellRows(32, 1, dim());
  const HeadProfile* used = coded() ? &profile : nullptr;
  HalfPage k(type(), Side::kKey, dim());
  const std::vector<float> plain = k.Encode(rows, 64, used).Decode(used), stored = k.DecodeRotated();
  std::vector<float> q(static_cast<size_t>(d), 0.0f);
  double constant = 0;
  for (size_t i = 0; i < queries.size(); i++) {
    q[i] = used ? queries[i] / profile.gain[i] : queries[i];
    if (used) constant += static_cast<double>(queries[i]) * static_cast<double>(profile.mean[i]);
  }
  RotateForward(type(), q.data(), d);
  for (int t = 0; t < 64; t++)
    EXPECT_NEAR(Dot(q.data(), &stored[static_cast<size_t>(t * d)], d) + constant,
                Dot(queries.data(), &plain[static_cast<size_t>(t * dim())], dim()), 2e-4 * std::sqrt(d))
        << "token " << t;

  HalfPage v(type(), Side::kValue, dim());
  const std::vector<float> eager = v.Encode(rows).Decode(), lazy = v.DecodeRotated();
  std::vector<float> sum(static_cast<size_t>(d), 0.0f), expected(static_cast<size_t>(dim()), 0.0f);
  for (int t = 0; t < 64; t++) {
    const float weight = static_cast<float>(random.Below(1000)) / 32000.0f;
    for (int i = 0; i < d; i++) sum[static_cast<size_t>(i)] += weight * lazy[static_cast<size_t>(t * d + i)];
    for (int i = 0; i < dim(); i++)
      expected[static_cast<size_t>(i)] += weight * eager[static_cast<size_t>(t * dim() + i)];
  }
  RotateInverse(type(), sum.data(), d);
  for (int i = 0; i < dim(); i++)
    EXPECT_NEAR(sum[static_cast<size_t>(i)], expected[static_cast<size_t>(i)], 1e-5f) << i;
}

TEST_P(Conformance, ShortPagesEqualPagesFilledWithZeros) {
  for (const Side side : kSides)
    for (const int tokens : {0, 1, 7, 33, 63}) {
      std::vector<float> rows = BellRows(41, 64, dim());
      const std::vector<std::byte> full = HalfPage(type(), side, dim()).Encode(rows).bytes;
      const std::vector<std::byte> part = HalfPage(type(), side, dim()).Encode(rows, tokens).bytes;
      std::fill(rows.begin() + tokens * dim(), rows.end(), 0.0f);
      EXPECT_EQ(HalfPage(type(), side, dim()).Encode(rows).bytes, part) << tokens;
      EXPECT_NE(part, full);
    }
}

// The codes of a token do not depend on its neighbours: encoding one by one equals encoding at once.
TEST_P(Conformance, TokensAreIndependent) {
  const std::vector<float> rows = BellRows(42, 64, dim());
  const std::vector<float> together = HalfPage(type(), Side::kKey, dim()).Encode(rows).DecodeRotated();
  const int d = StoredDim(dim());
  for (const int t : {0, 5, 31, 32, 63}) {
    std::vector<float> alone(rows.size(), 0.0f);
    std::copy_n(rows.begin() + t * dim(), dim(), alone.begin() + t * dim());
    const std::vector<float> decoded = HalfPage(type(), Side::kKey, dim()).Encode(alone).DecodeRotated();
    for (int i = 0; i < d; i++)
      ASSERT_EQ(decoded[static_cast<size_t>(t * d + i)], together[static_cast<size_t>(t * d + i)]);
  }
}

TEST_P(Conformance, EncodingIsDeterministicAndWritesEveryByte) {
  const std::vector<float> rows = BellRows(43, 64, dim());
  HalfPage a(type(), Side::kValue, dim()), b(type(), Side::kValue, dim());
  std::fill(b.bytes.begin(), b.bytes.end(), std::byte{0x3c});
  EXPECT_EQ(a.Encode(rows).bytes, b.Encode(rows).bytes);
}

TEST_P(Conformance, ZeroRowsDecodeToZero) {
  for (const Side side : kSides)
    for (const float x :
         HalfPage(type(), side, dim()).Encode(std::vector<float>(static_cast<size_t>(64 * dim()))).Decode())
      ASSERT_EQ(x, 0.0f);
}

TEST_P(Conformance, ConstantHugeAndTinyRowsStayFiniteAndInProportion) {
  // A constant row is the worst case of a Walsh-Hadamard transform (one spike); 2^-24 is the smallest f16
  // value.
  for (const Side side : kSides)
    for (const float value : {1.0f, 65504.0f, -65504.0f, 1e-3f, 5.9604645e-8f, 1e-38f, 1e-45f}) {
      const std::vector<float> rows(static_cast<size_t>(64 * dim()), value);
      const std::vector<float> decoded = HalfPage(type(), side, dim()).Encode(rows).Decode();
      for (const float x : decoded) ASSERT_TRUE(std::isfinite(x)) << info().name << " " << value;
      if (std::fabs(value) < 1e-3f) {
        for (const float x : decoded)
          ASSERT_LE(std::fabs(x), 6 * std::fabs(value) + 1e-7f) << info().name << " " << value;
      } else if (!info().rotated) {
        for (const float x : decoded) ASSERT_NEAR(x, value, std::fabs(value) * (coded() ? 1e-3f : 1e-2f));
      } else {
        // Spikes are coded coarsely, but their projection must be right: the scale did not saturate.
        const double ratio = Dot(decoded.data(), rows.data(), dim()) / Dot(rows.data(), rows.data(), dim());
        ASSERT_GT(ratio, 0.99) << info().name << " " << value;
        ASSERT_LT(ratio, 1.01) << info().name << " " << value;
      }
    }
}

TEST_P(Conformance, ASpikeInAnyChannelKeepsItsPlace) {
  for (const Side side : kSides) {
    std::vector<float> rows(static_cast<size_t>(64 * dim()), 0.0f);
    for (int t = 0; t < 64; t++)
      rows[static_cast<size_t>(t * dim() + (t * 7) % dim())] = t % 2 ? 100.0f : -100.0f;
    const std::vector<float> decoded = HalfPage(type(), side, dim()).Encode(rows).Decode();
    for (int t = 0; t < 64; t++) {
      const auto begin = decoded.begin() + t * dim();
      const auto largest = std::max_element(begin, begin + dim(),
                                            [](float a, float b) { return std::fabs(a) < std::fabs(b); });
      EXPECT_EQ(largest - begin, (t * 7) % dim()) << info().name;
      EXPECT_GT(*largest * (t % 2 ? 1 : -1), 0) << info().name;
    }
  }
}

std::vector<int> TypeIndices() {
  std::vector<int> indices;
  for (int i = 0; i < kCodecTypes; i++) indices.push_back(i);
  return indices;
}

INSTANTIATE_TEST_SUITE_P(All, Conformance,
                         testing::Combine(testing::ValuesIn(TypeIndices()),
                                          testing::ValuesIn(test::HeadDims())),
                         [](const testing::TestParamInfo<std::tuple<int, int>>& p) {
                           return std::string(Name(static_cast<CacheType>(std::get<0>(p.param)))) + "_d" +
                                  std::to_string(std::get<1>(p.param));
                         });

}  // namespace
}  // namespace kvtide
