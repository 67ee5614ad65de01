// The tiles of the prefill kernels in an emulated warp, against float64: head dims, tiles of one or two
// pages, masks, soft-cap, raised references, values added after the next tile was weighed; and the cut of
// groups into parts.
#include "kernels/cuda/prefill/prefill_tile.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/base/float16.h"
#include "kernels/cuda/prefill/prefill_cut.h"
#include "kernels/cuda/prefill/prefill_pages.h"
#include "tests/kernels/warp_emulator.h"

namespace kvtide {
namespace {

using cuda::PrefillTile;
using cuda::RowLimits;
using cuda::TileIndex;
using testing::EmulatedWarp;
using testing::RunWarp;

struct Case {
  int tiles = 1;
  float magnitude = 1;  // of the queries
  float softcap = 0;    // in units of the logits times log2(e)
  float growth = 0;     // of the keys from page to page: the reference has to follow
  bool causal = false;
  unsigned seed = 1;
  bool overlap = false;  // values are added when the next tile is weighed
};

// Rows of 128 queries, of which one warp computes the last kRows.
template <int D, int MT, int kTokens = kBlockTokens>
void Check(const Case& c) {
  SCOPED_TRACE("d " + std::to_string(D) + " seed " + std::to_string(c.seed));
  constexpr int kQueryRows = 128;
  using Tile = PrefillTile<EmulatedWarp, D, MT, kQueryRows, kTokens>;
  constexpr int kFirst = kQueryRows - Tile::kRows;
  std::mt19937 rng(c.seed);
  std::normal_distribution<float> normal;
  const auto make = [&](int rows, float size, std::vector<uint8_t>& bytes, std::vector<double>& values) {
    const size_t count = static_cast<size_t>(rows * D);
    bytes.resize(2 * count);
    values.resize(count);
    for (int r = 0; r < rows; r++)
      for (int d = 0; d < D; d++) {
        const uint16_t half = F32ToF16(size * normal(rng));
        std::memcpy(&bytes[static_cast<size_t>(2 * TileIndex(r, d, rows))], &half, 2);
        values[static_cast<size_t>(r * D + d)] = static_cast<double>(F16ToF32(half));
      }
  };
  std::vector<uint8_t> query;
  std::vector<double> q;
  make(kQueryRows, 1.0f, query, q);
  std::vector<std::vector<uint8_t>> k_tiles(static_cast<size_t>(c.tiles)), v_tiles(k_tiles.size());
  std::vector<std::vector<double>> k(k_tiles.size()), v(k_tiles.size());
  for (size_t p = 0; p < k_tiles.size(); p++) {
    make(kTokens, 1.0f + c.growth * static_cast<float>(p), k_tiles[p], k[p]);
    make(kTokens, 1.0f, v_tiles[p], v[p]);
  }
  const float unit = c.magnitude * 1.44269504f / std::sqrt(static_cast<float>(D));
  const int tokens = kTokens * c.tiles - 7;
  const auto limit = [&](int row) {
    return RowLimits{row % 5, c.causal ? std::min(tokens, row + 20) : tokens};
  };

  std::vector<double> out(static_cast<size_t>(Tile::kRows * D)), sums(Tile::kRows), references(Tile::kRows);
  RunWarp([&](int lane) {
    const int n = lane >> 2, column = lane & 3;
    auto tile = std::make_unique<Tile>();
    tile->Reset();
    float multiplier[MT][2];
    RowLimits limits[MT][2];
    for (int m = 0; m < MT; m++)
      for (int h = 0; h < 2; h++) {
        multiplier[m][h] = unit;
        limits[m][h] = limit(kFirst + 16 * m + n + 8 * h);
      }
    uint32_t weights[MT][Tile::kGroups / 2][4];
    for (size_t p = 0; p < k_tiles.size(); p++) {
      float logits[MT][Tile::kGroups][4], factors[MT][2];
      tile->KeyStage(query.data() + kFirst * 128, k_tiles[p].data(), logits);
      if (c.softcap > 0) Tile::Cap(c.softcap, multiplier, logits);
      Tile::Mask(static_cast<int>(p) * kTokens, limits, logits);
      if (!c.overlap) {
        tile->Weigh(logits, multiplier, weights);
        tile->ValueStage(v_tiles[p].data(), weights);
        continue;
      }
      const bool raised = tile->Raise(logits, multiplier, factors);
      tile->Exponentials(logits, multiplier);
      if (p > 0) tile->ValueStage(v_tiles[p - 1].data(), weights);
      if (raised) tile->Rescale(factors);
      Tile::Pack(logits, weights);
    }
    if (c.overlap) tile->ValueStage(v_tiles.back().data(), weights);
    tile->Finish();
    for (int m = 0; m < MT; m++)
      for (int h = 0; h < 2; h++) {
        const size_t row = static_cast<size_t>(16 * m + n + 8 * h);
        sums[row] = static_cast<double>(tile->sum[m][h]);
        references[row] = static_cast<double>(tile->Reference(m, h));
        for (int j = 0; j < D / 8; j++)
          for (int e = 0; e < 2; e++)
            out[row * D + static_cast<size_t>(8 * j + 2 * column + e)] =
                static_cast<double>(tile->output[m][j][2 * h + e]);
      }
  });

  for (int r = 0; r < Tile::kRows; r++) {
    std::vector<double> logits(static_cast<size_t>(c.tiles * kTokens), -1e300), expected(D, 0.0);
    double top = -1e300, sum = 0;
    const RowLimits visible = limit(kFirst + r);
    for (int t = visible.begin; t < visible.end; t++) {
      double dot = 0;
      for (int d = 0; d < D; d++)
        dot += q[static_cast<size_t>((kFirst + r) * D + d)] *
               k[static_cast<size_t>(t / kTokens)][static_cast<size_t>(t % kTokens * D + d)];
      dot *= static_cast<double>(unit);
      if (c.softcap > 0)
        dot = static_cast<double>(c.softcap) * std::tanh(dot / static_cast<double>(c.softcap));
      logits[static_cast<size_t>(t)] = dot;
      top = std::max(top, dot);
    }
    for (int t = visible.begin; t < visible.end; t++) {
      const double w = std::exp2(logits[static_cast<size_t>(t)] - top);
      sum += w;
      for (int d = 0; d < D; d++)
        expected[static_cast<size_t>(d)] +=
            w * v[static_cast<size_t>(t / kTokens)][static_cast<size_t>(t % kTokens * D + d)];
    }
    double error = 0, size = 0;
    for (int d = 0; d < D; d++) {
      const double e = expected[static_cast<size_t>(d)] / sum,
                   x = out[static_cast<size_t>(r * D + d)] / sums[static_cast<size_t>(r)];
      error += (e - x) * (e - x);
      size += e * e;
    }
    ASSERT_LE(std::sqrt(error), 1e-3 * std::sqrt(size)) << "row " << r;
    ASSERT_NEAR(references[static_cast<size_t>(r)] + std::log2(sums[static_cast<size_t>(r)]),
                top + std::log2(sum), 1e-3)
        << "row " << r;
  }
}

TEST(PrefillTile, HeadDimsAgainstFloat64) {
  Check<64, 2>({});
  Check<128, 2>({});
  Check<128, 1>({});
  Check<192, 1>({});
  Check<256, 1>({});
  Check<64, 1, 128>({});
  Check<128, 1, 128>({});
}

TEST(PrefillTile, MasksCapsAndRaisesTheReference) {
  for (unsigned seed = 2; seed < 5; seed++) {
    Check<64, 2>({3, 1.0f, 0.0f, 0.0f, true, seed});
    Check<64, 2>({4, 3.0f, 0.0f, 2.0f, false, seed});   // logits grow by far more than the slack
    Check<64, 2>({2, 10.0f, 6.0f, 0.0f, false, seed});  // most logits at the cap
    Check<128, 1>({3, 40.0f, 0.0f, 1.0f, true, seed});
  }
}

TEST(PrefillTile, AddsValuesWhenTheNextTileIsWeighed) {
  for (unsigned seed = 5; seed < 8; seed++) {
    Check<64, 1, 128>({4, 3.0f, 0.0f, 2.0f, false, seed, true});
    Check<64, 1, 128>({3, 10.0f, 6.0f, 0.0f, true, seed, true});
    Check<128, 1, 128>({3, 40.0f, 0.0f, 1.0f, true, seed, true});
    Check<256, 1>({3, 3.0f, 0.0f, 1.0f, false, seed, true});
  }
}

TEST(PrefillTile, RowsThatSeeNothingHaveNoWeight) {
  using Tile = PrefillTile<EmulatedWarp, 64, 1, 16>;
  const std::vector<uint8_t> zeros(64 * 64 * 2);
  RunWarp([&](int) {
    auto tile = std::make_unique<Tile>();
    tile->Reset();
    const float multiplier[1][2] = {{1, 1}};
    const RowLimits limits[1][2] = {};
    float logits[1][Tile::kGroups][4];
    uint32_t weights[1][Tile::kGroups / 2][4];
    tile->KeyStage(const_cast<uint8_t*>(zeros.data()), const_cast<uint8_t*>(zeros.data()), logits);
    Tile::Mask(0, limits, logits);
    tile->Weigh(logits, multiplier, weights);
    tile->ValueStage(const_cast<uint8_t*>(zeros.data()), weights);
    tile->Finish();
    EXPECT_EQ(tile->sum[0][0], 0.0f);
    EXPECT_EQ(tile->sum[0][1], 0.0f);
    EXPECT_EQ(tile->output[0][0][0], 0.0f);
  });
}

TEST(PrefillTile, EveryValueHasAPlaceOfItsOwn) {
  for (int rows : {64, 128, 192}) {
    std::vector<bool> taken(static_cast<size_t>(rows * 192));
    for (int r = 0; r < rows; r++)
      for (int d = 0; d < 192; d++) {
        const size_t at = static_cast<size_t>(TileIndex(r, d, rows));
        ASSERT_LT(at, taken.size());
        ASSERT_FALSE(taken[at]);
        taken[at] = true;
      }
  }
}

TEST(PrefillPages, AreRowsOfTheirBaseOrCopied) {
  using cuda::kScratchPlace;
  const auto at = [](uint64_t address) { return reinterpret_cast<const std::byte*>(address); };
  constexpr uint64_t kBase = 1u << 20;
  cuda::PagePlace place = 0;
  EXPECT_TRUE(cuda::PlaceOfPage(at(kBase), at(kBase), 128, &place));
  EXPECT_EQ(place, 0u);
  EXPECT_TRUE(cuda::PlaceOfPage(at(kBase), at(kBase + 3 * 128 * 256), 128, &place));
  EXPECT_EQ(place, 3u * 128);
  EXPECT_FALSE(cuda::PlaceOfPage(at(kBase), at(kBase + 128), 128, &place));  // between two rows
  EXPECT_TRUE(cuda::PlaceOfPage(at(kBase), at(kBase + 128), 64, &place));
  EXPECT_FALSE(cuda::PlaceOfPage(at(kBase), at(kBase - 256), 128, &place));
  // The last page whose rows have numbers.
  const uint64_t rows = kScratchPlace - cuda::kRowsOfPage;
  EXPECT_TRUE(cuda::PlaceOfPage(at(kBase), at(kBase + rows * 256), 128, &place));
  EXPECT_EQ(place, rows);
  EXPECT_FALSE(cuda::PlaceOfPage(at(kBase), at(kBase + (rows + 1) * 256), 128, &place));
  EXPECT_EQ(cuda::PlaceInScratch(5), kScratchPlace + 5 * 128);
}

TEST(PrefillCut, CountsUnequalGroupsAndTheMerge) {
  using cuda::PartPages;
  // A causal chunk: groups of all lengths fill the CTAs evenly as they are.
  std::vector<int> triangle;
  for (int head = 0; head < 8; head++)
    for (int g = 0; g < 64; g++) triangle.push_back(1 + g / 2);
  EXPECT_EQ(PartPages(triangle, 132, 8, 1000, 2), 32);
  // Nearly a wave: cutting to fill the last CTAs would cost more than it gains.
  EXPECT_EQ(PartPages(std::vector<int>(128, 512), 132, 8, 1000, 2), 512);
  // Half a wave is cut in two.
  EXPECT_EQ(PartPages(std::vector<int>(64, 512), 132, 8, 1000, 2), 256);
}

TEST(PrefillCut, FillsWholeWavesWithinTheLimit) {
  using cuda::PartPages;
  const auto parts = [](const std::vector<int>& groups, int length) {
    int count = 0;
    for (int pages : groups) count += (pages + length - 1) / length;
    return count;
  };
  // One group on many CTAs is cut; many equal groups that fill a wave are not.
  EXPECT_LE(PartPages({128}, 132, 4, 1000), 8);
  EXPECT_EQ(PartPages(std::vector<int>(132, 100), 132, 4, 1000), 100);
  EXPECT_EQ(PartPages(std::vector<int>(66, 100), 132, 4, 1000), 50);
  // Never more parts than slots.
  for (size_t most : {3u, 4u, 7u, 20u}) {
    const std::vector<int> groups = {100, 50, 7};
    EXPECT_LE(static_cast<size_t>(parts(groups, PartPages(groups, 132, 4, most))), most);
  }
  EXPECT_GE(PartPages({0, 0}, 132, 4, 2), 1);
  // Whole tiles.
  for (int pages : {1, 2, 99, 100, 128}) EXPECT_EQ(PartPages({pages, 7}, 132, 4, 1000, 2) % 2, 0);
}

}  // namespace
}  // namespace kvtide
