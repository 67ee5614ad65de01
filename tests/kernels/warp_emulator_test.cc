// The warp-level code of the CUDA backend, run in an emulated warp and compared with float64 on the stored
// codes.
#include "tests/kernels/warp_emulator.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cuda/attend/coded_tile.h"
#include "kernels/cuda/attend/half_tile.h"
#include "kernels/cuda/attend/level_tile.h"
#include "kernels/cuda/attend/query_row.h"
#include "kernels/cuda/attend/tide_tile.h"
#include "kernels/format/page_codec.h"
#include "tests/format/test_tide.h"
#include "tests/kernels/rebuilt_keys.h"

namespace kvtide {
namespace {

using cuda::CodedTile;
using cuda::HalfTile;
using cuda::WarpRow;
using testing::EmulatedWarp;
using testing::RunWarp;

constexpr float kLog2E = 1.4426950408889634f;

struct Shape {
  int rows;  // query rows that count
  int tokens;
  float magnitude;  // of the queries
  bool equal_v_scales = false;
  int first = 0;    // tokens before it are masked, as by a window
  float scale = 1;  // of logits, times 1/sqrt(d)
};

struct Problem {
  int dk, dv, pages;
  std::vector<std::vector<std::byte>> k_halves, v_halves;
  std::vector<float> k, v;  // rotated frame, [tokens][d]
  std::vector<float> q;     // [rows][dk], in K's frame
};

CacheType TypeOf(const char* name) { return *ParseCacheType(name); }

// Random codes; random positive scales. For half types: random values, and noise where no token is.
Problem MakeProblem(CacheType k_type, CacheType v_type, int dk, int dv, const Shape& shape, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Problem p{dk, dv, (shape.tokens + 63) / 64, {}, {}, {}, {}, {}};
  const auto make = [&](Side side, CacheType type, int d, bool equal,
                        std::vector<std::vector<std::byte>>& halves, std::vector<float>& rows) {
    const HalfLayout layout = MakeHalfLayout(type, d);
    rows.resize(static_cast<size_t>(p.pages) * 64 * static_cast<size_t>(d));
    for (int page = 0; page < p.pages; page++) {
      std::vector<std::byte> half(layout.bytes);
      if (layout.groups == 0) {
        std::vector<float> values(static_cast<size_t>(64 * d));
        for (float& x : values) x = normal(rng);
        EncodeHalf(type, side, layout, nullptr, values.data(), 64, half.data());
      } else {
        for (std::byte& b : half) b = static_cast<std::byte>(rng());
        for (size_t i = layout.code_bytes; i < half.size(); i += 2) {
          float scale = equal ? 0.5f : 0.05f + static_cast<float>(rng() % 1000) * 1e-3f;
          if (Info(type).group == 32 && Info(type).bits < 8 && rng() % 2) scale = -scale;
          const uint16_t bits = F32ToF16(scale);
          std::memcpy(&half[i], &bits, 2);
        }
      }
      DecodeHalfRotated(type, side, layout, half.data(),
                        &rows[static_cast<size_t>(page) * 64 * static_cast<size_t>(d)]);
      halves.push_back(std::move(half));
    }
  };
  make(Side::kKey, k_type, dk, false, p.k_halves, p.k);
  make(Side::kValue, v_type, dv, shape.equal_v_scales, p.v_halves, p.v);
  p.q.resize(static_cast<size_t>(shape.rows * dk));
  for (float& x : p.q) x = shape.magnitude * normal(rng);
  return p;
}

// What tiles need beside their tables, if they do.
struct NoKeyTables {
  template <class Tile>
  void Begin(Tile&, uint8_t*, int) const {}
  template <class Tile>
  void BeginPage(Tile&, int) const {}
};

// Runs a tile class over the problem as the kernel does and compares with float64.
template <class Tile, int DK, int DV, class Write, class Keys = NoKeyTables>
void Check(const Problem& p, const Shape& shape, float limit, Write write, const Keys& keys = {}) {
  const float scale = shape.scale / std::sqrt(static_cast<float>(DK)),
              key_scale = scale * kLog2E * Tile::kKUnit;
  std::vector<uint8_t> area(Tile::kQueryBytes + 64);
  std::vector<float> units(Tile::kRows);
  for (int r = 0; r < Tile::kRows; r++)
    RunWarp([&](int lane) {
      WarpRow<DK> row;
      for (int b = 0; b < WarpRow<DK>::kBlocks; b++)
        for (int i = 0; i < 4; i++) {
          const int dim = 128 * b + 4 * lane + i;
          row.x[b][i] = r < shape.rows && dim < DK ? p.q[static_cast<size_t>(r * DK + dim)] : 0.0f;
        }
      const float unit = write(row, key_scale, r, area.data());
      if (lane == 0) units[static_cast<size_t>(r)] = unit;
    });
  std::vector<std::vector<uint8_t>> k(p.k_halves.size()), v(p.k_halves.size());
  for (size_t i = 0; i < k.size(); i++) {
    const auto* kb = reinterpret_cast<const uint8_t*>(p.k_halves[i].data());
    const auto* vb = reinterpret_cast<const uint8_t*>(p.v_halves[i].data());
    k[i].assign(kb, kb + p.k_halves[i].size());
    k[i].resize(k[i].size() + 512, 0xa5);  // tiles may read what follows the keys, whatever it is
    v[i].assign(vb, vb + p.v_halves[i].size());
  }
  std::vector<std::unique_ptr<Tile>> tiles(32);
  std::vector<uint8_t> table_memory(Tile::kTableBytes + 1);
  uint8_t* const tables = table_memory.data();
  std::vector<float> out(static_cast<size_t>(Tile::kRows * DV), NAN), lse(Tile::kRows, NAN);
  RunWarp([&](int lane) {
    tiles[static_cast<size_t>(lane)] = std::make_unique<Tile>();
    Tile& tile = *tiles[static_cast<size_t>(lane)];
    const int n = lane >> 2, c = lane & 3;
    constexpr int kTiles = Tile::kRows / 8;
    float multiplier[kTiles];
    for (int m = 0; m < kTiles; m++) multiplier[m] = units[static_cast<size_t>(n + 8 * m)];
    if (lane == 0) Tile::WriteTables(tables);
    EmulatedWarp::All(true);
    tile.Init(tables);
    tile.rows.Reset();
    tile.LoadQuery(area.data());
    keys.Begin(tile, tables, lane);
    for (int page = 0; page < p.pages; page++)
      for (int t = 0; t < Tile::kTilesPerPage; t++) {
        float y[kTiles][Tile::kLogits];
        keys.BeginPage(tile, page);
        tile.KeyStage(&k[static_cast<size_t>(page)][static_cast<size_t>(Tile::kKPieceOffset(t))], t, y);
        const int first = page * 64 + t * Tile::kTokens;
        const auto mask = [&](float(&logits)[kTiles][Tile::kLogits], float(&)[kTiles]) {
          for (int m = 0; m < kTiles; m++)
            for (int l = 0; l < Tile::kLogits; l++)
              if (const int token = first + Tile::TokenOf(l, c); token < shape.first || token >= shape.tokens)
                logits[m][l] = cuda::kMasked;
        };
        const int v_offset = Tile::kVPieceOffset(t) - Tile::kVPieceOffset(0);
        tile.ValueStage(&v[static_cast<size_t>(page)][static_cast<size_t>(v_offset)], t, y, multiplier,
                        first < shape.first || first + Tile::kTokens > shape.tokens, mask);
      }
    for (int m = 0; m < kTiles; m++) {
      float sum = tile.rows.sum[m];
      sum += EmulatedWarp::ShflXor(sum, 1);
      sum += EmulatedWarp::ShflXor(sum, 2);
      for (int j = 0; j < DV / 8; j++)
        for (int e = 0; e < 2; e++)
          out[static_cast<size_t>((n + 8 * m) * DV + 8 * j + 2 * c + e)] =
              tile.rows.output[m][j][e] / sum * Tile::kVUnit;
      if (c == 0) lse[static_cast<size_t>(n + 8 * m)] = (tile.rows.reference[m] + std::log2(sum)) / kLog2E;
    }
  });
  for (int r = 0; r < shape.rows; r++) {
    std::vector<double> logits(static_cast<size_t>(shape.tokens));
    double top = -1e300, sum = 0, largest = 0;
    for (int t = shape.first; t < shape.tokens; t++) {
      double dot = 0;
      for (int d = 0; d < DK; d++)
        dot += static_cast<double>(p.q[static_cast<size_t>(r * DK + d)]) *
               static_cast<double>(p.k[static_cast<size_t>(t * DK + d)]);
      logits[static_cast<size_t>(t)] = dot * static_cast<double>(scale);
      top = std::max(top, logits[static_cast<size_t>(t)]);
      largest = std::max(largest, std::fabs(logits[static_cast<size_t>(t)]));
    }
    std::vector<double> expected(DV, 0.0);
    for (int t = shape.first; t < shape.tokens; t++) {
      const double w = std::exp(logits[static_cast<size_t>(t)] - top);
      sum += w;
      for (int d = 0; d < DV; d++)
        expected[static_cast<size_t>(d)] += w * static_cast<double>(p.v[static_cast<size_t>(t * DV + d)]);
    }
    double error = 0, size = 0;
    for (int d = 0; d < DV; d++) {
      const double e = expected[static_cast<size_t>(d)] / sum,
                   x = static_cast<double>(out[static_cast<size_t>(r * DV + d)]);
      error += (e - x) * (e - x);
      size += e * e;
    }
    EXPECT_LE(std::sqrt(error / size), static_cast<double>(limit))
        << "row " << r << " tokens " << shape.tokens;
    EXPECT_NEAR(static_cast<double>(lse[static_cast<size_t>(r)]), top + std::log(sum),
                0.4 * std::max(static_cast<double>(limit), 5e-4) + 1e-4 * largest)
        << "row " << r;
  }
}

template <class KCodec, class VCodec, int DK, int DV, int MT>
void CheckCoded(const Shape& shape, unsigned seed, float limit = 5e-4f) {
  using Tile = CodedTile<EmulatedWarp, KCodec, VCodec, DK, DV, MT>;
  const Problem p = MakeProblem(TypeOf(KCodec::kName), TypeOf(VCodec::kName), DK, DV, shape, seed);
  Check<Tile, DK, DV>(p, shape, limit, [](WarpRow<DK>& row, float key_scale, int r, uint8_t* area) {
    return cuda::WriteCodedQuery<EmulatedWarp, DK, KCodec::kGroup, Tile::KDecoder::kOffset,
                                 Tile::KDecoder::kInterleaved>(row, key_scale, r, area,
                                                               Tile::kQueryFragmentBytes);
  });
}

template <bool kBf16, int DK, int DV, int MT, int kTokens>
void CheckHalf(const Shape& shape, unsigned seed) {
  using Tile = HalfTile<EmulatedWarp, kBf16, DK, DV, MT, kTokens>;
  const CacheType type = TypeOf(kBf16 ? "bf16" : "f16");
  const Problem p = MakeProblem(type, type, DK, DV, shape, seed);
  Check<Tile, DK, DV>(p, shape, kBf16 ? 1e-3f : 1e-4f,
                      [](WarpRow<DK>& row, float key_scale, int r, uint8_t* area) {
                        return cuda::WriteHalfQuery<EmulatedWarp, DK, kBf16>(row, key_scale, r, area);
                      });
}

// Widths of the groups of heads of 64.
const std::vector<std::vector<uint8_t>> kMixedWidths{
    {4, 4, 4, 4, 3, 3, 3, 3}, {2, 2, 2, 2, 1, 1, 1, 1}, {4, 3, 2, 1, 0, 4, 0, 1}, {3, 2, 1, 0, 2, 0, 1, 1},
    {1, 0, 0, 0, 0, 0, 0, 0}, {5, 6, 5, 6, 5, 5, 0, 0}, {0, 1, 5, 2, 6, 3, 4, 6}, {0, 0, 0, 0, 0, 0, 0, 5},
    {4, 4, 0, 0, 0, 0, 0, 0}, {3, 2, 4, 3, 3, 2, 0, 0}, {0, 6, 5, 1, 6, 0, 0, 2}, {5, 5, 5, 5, 6, 3, 2, 2},
    {3, 4, 3, 4, 4, 0, 4, 3}, {0, 0, 0, 0, 0, 0, 0, 0},
};

// The tables of calibrated keys and where the first page stands.
struct KeyTables {
  const std::vector<std::byte>& tables;
  int64_t position;
  mutable std::vector<uint8_t> scratch = std::vector<uint8_t>(8192);
  template <class Tile>
  void Begin(Tile& tile, uint8_t* area, int lane) const {
    Tile::WriteLookup(area, lane, 32);
    EmulatedWarp::Sync();
    tile.InitKeys(area, scratch.data());
    tile.BeginUnit({tables.data(), position});
  }
  template <class Tile>
  void BeginPage(Tile& tile, int page) const {
    tile.BeginPage(page);
  }
};

// Keys of head dim `dim`, at most DK, with a profile of its own, against those that the tile means.
template <int kBits, class VCodec, int DK, int MT, int kHalves>
void CheckTide(const HeadProfile& head, int64_t position, const Shape& shape, unsigned seed,
               float limit = 4e-3f, float outlier = 3) {
  using Tile = cuda::TideTile<EmulatedWarp, kBits, VCodec, DK, DK, MT, kHalves>;
  const int dim = static_cast<int>(head.centre.size());
  const CacheType type = TypeOf(kTideNames[4 - kBits]);
  const HalfLayout layout = MakeHalfLayout(type, dim);
  Problem p = MakeProblem(TypeOf("turbo3"), TypeOf(VCodec::kName), DK, DK, shape, seed);
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  p.k.assign(p.k.size(), 0.0f);
  for (int page = 0; page < p.pages; page++) {
    std::vector<float> rows(static_cast<size_t>(64 * dim));
    for (float& x : rows) x = normal(rng);
    for (int i = 0; i < dim; i++) rows[static_cast<size_t>(7 * dim + i)] *= outlier;  // with a gain
    std::vector<std::byte> half(layout.bytes);
    const int64_t first = position + 64 * page;
    EncodeHalf(type, Side::kKey, layout, &head, first, rows.data(), 64, half.data());
    const std::vector<float> meant = testing::RebuiltKeys(type, layout, head, first, half.data());
    for (int t = 0; t < 64; t++)
      for (int i = 0; i < dim; i++)
        p.k[static_cast<size_t>((page * 64 + t) * DK + i)] = meant[static_cast<size_t>(t * dim + i)];
    p.k_halves[static_cast<size_t>(page)] = half;
  }
  for (int r = 0; r < shape.rows; r++)
    for (int d = dim; d < DK; d++) p.q[static_cast<size_t>(r * DK + d)] = 0;
  Profile profile;
  profile.shape = {1, 1, dim, dim};
  profile.k.push_back(head);
  const std::vector<std::byte> tables = cuda::MakeTideTables(profile, type);
  const auto write = [&](WarpRow<DK>& row, float key_scale, int r, uint8_t* area) {
    return cuda::WriteTideQuery<EmulatedWarp, DK>(row, key_scale, r, tables.data(), area);
  };
  Check<Tile, DK, DK>(p, shape, limit, write, KeyTables{tables, position});
}

TEST(TideTile, EveryTypeAgainstFloat64) {
  CheckTide<4, Turbo4, 128, 1, 1>(test::TideHead(128, 1), 64 * 37, {8, 130, 1.0f}, 1);
  CheckTide<3, Turbo3, 128, 1, 1>(test::TideHead(128, 2), 64 * 999, {5, 64, 1.0f}, 2);
  CheckTide<2, Turbo2, 128, 1, 1>(test::TideHead(128, 3), 0, {8, 200, 1.0f}, 3);
  CheckTide<3, Turbo3, 64, 1, 1>(test::TideHead(64, 4), 64 * 100000, {8, 100, 1.0f}, 4);
  CheckTide<1, Turbo2, 128, 1, 1>(test::TideHead(128, 9), 640, {8, 130, 1.0f}, 9);
  CheckTide<1, Turbo2, 64, 1, 1>(test::TideHead(64, 10), 640, {8, 100, 1.0f}, 10);
}

TEST(TideTile, SixteenRowsAndPaddedHeads) {
  CheckTide<3, Turbo3, 128, 2, 2>(test::TideHead(128, 5), 64, {16, 130, 1.0f}, 5);
  CheckTide<2, Turbo2, 64, 2, 2>(test::TideHead(64, 6), 128, {11, 70, 1.0f}, 6);
  CheckTide<3, Turbo3, 128, 1, 1>(test::TideHead(112, 7), 640, {8, 64, 1.0f}, 7);
  CheckTide<3, Turbo3, 64, 1, 1>(test::TideHead(48, 8), 640, {8, 64, 1.0f}, 8);
  CheckTide<1, Turbo2, 128, 2, 2>(test::TideHead(112, 11), 640, {13, 64, 1.0f}, 11);
}

// Every width beside every other one in a step, steps without bits, and both ways through a page.
TEST(TideTile, EveryMixOfWidths) {
  unsigned seed = 20;
  for (const std::vector<uint8_t>& widths : kMixedWidths) {
    HeadProfile head = test::TideHead(64, 9);
    std::copy(widths.begin(), widths.end(), head.widths.begin());
    CheckTide<4, Turbo4, 64, 1, 1>(head, 640, {8, 64, 1.0f}, seed);
    CheckTide<4, Turbo4, 64, 2, 2>(head, 640, {8, 64, 1.0f}, seed++);
  }
}

// What the rounding of transforms and levels adds to the squared error of keys, of what coding makes.
TEST(TideTile, RoundingIsSmallBesideCoding) {
  const double limits[] = {0.2, 0.1, 0.05, 0.02};
  for (const uint64_t seed : {1, 2, 3})
    for (int i = 0; i < kTideTypes; i++) {
      const HeadProfile head = test::TideHead(128, seed);
      const CacheType type = TypeOf(kTideNames[i]);
      const HalfLayout layout = MakeHalfLayout(type, 128);
      std::mt19937 rng(static_cast<unsigned>(seed));
      std::normal_distribution<float> normal;
      std::vector<float> rows(64 * 128), decoded(rows.size());
      for (float& x : rows) x = normal(rng);
      std::vector<std::byte> half(layout.bytes);
      EncodeHalf(type, Side::kKey, layout, &head, 640, rows.data(), 64, half.data());
      DecodeHalf(type, Side::kKey, layout, &head, 640, half.data(), decoded.data());
      const std::vector<float> rebuilt = testing::RebuiltKeys(type, layout, head, 640, half.data());
      double coding = 0, rounding = 0;
      for (size_t j = 0; j < rows.size(); j++) {
        coding += static_cast<double>((decoded[j] - rows[j]) * (decoded[j] - rows[j]));
        rounding += static_cast<double>((rebuilt[j] - decoded[j]) * (rebuilt[j] - decoded[j]));
      }
      EXPECT_LT(rounding, limits[i] * coding) << kTideNames[i] << " " << rounding / coding;
    }
}

// Gains of outliers and channels that never differ stay within halves.
TEST(TideTile, OutliersAndConstantChannels) {
  HeadProfile head = test::TideHead(128, 12);
  for (size_t j = 0; j < 128; j++) head.inverse[5 * 128 + j] = head.inverse[40 * 128 + j] = 0;
  head.centre[40] = 300;
  CheckTide<3, Turbo3, 128, 1, 1>(head, 64 * 7, {8, 130, 1e-5f}, 12, 4e-3f, 6e4f);
}

// What LevelTile needs beside its tables.
template <int D>
struct LevelKeys {
  const cuda::LevelUnit<D>& unit;
  mutable std::vector<uint8_t> scratch = std::vector<uint8_t>(4096);
  template <class Tile>
  void Begin(Tile& tile, uint8_t* area, int lane) const {
    Tile::WriteLookup(area, lane, 32);
    EmulatedWarp::Sync();
    tile.InitKeys(area, scratch.data());
    tile.BeginUnit(unit);
  }
  template <class Tile>
  void BeginPage(Tile& tile, int page) const {
    tile.BeginPage(page);
  }
};

// Keys coded after RoPE, as distances from their mean; queries times the mean are checked beside.
template <int kBits, class VCodec, int DK, int MT>
void CheckLevels(HeadProfile head, const Shape& shape, unsigned seed, float limit = 5e-4f) {
  using Tile = cuda::LevelTile<EmulatedWarp, kBits, VCodec, DK, DK, MT>;
  using Tables = cuda::LevelTables<DK>;
  const int dim = static_cast<int>(head.centre.size());
  head.rope = {};
  const CacheType type = TypeOf(kTideNames[4 - kBits]);
  const HalfLayout layout = MakeHalfLayout(type, dim);
  Problem p = MakeProblem(TypeOf("turbo3"), TypeOf(VCodec::kName), DK, DK, shape, seed);
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  p.k.assign(p.k.size(), 0.0f);
  for (int page = 0; page < p.pages; page++) {
    std::vector<float> rows(static_cast<size_t>(64 * dim));
    for (float& x : rows) x = normal(rng);
    for (int i = 0; i < dim; i++) rows[static_cast<size_t>(7 * dim + i)] *= 3;  // with a gain
    std::vector<std::byte> half(layout.bytes);
    EncodeHalf(type, Side::kKey, layout, &head, 64 * page, rows.data(), 64, half.data());
    DecodeHalf(type, Side::kKey, layout, &head, 64 * page, half.data(), rows.data());
    for (int t = 0; t < 64; t++)
      for (int i = 0; i < dim; i++)
        p.k[static_cast<size_t>((page * 64 + t) * DK + i)] =
            rows[static_cast<size_t>(t * dim + i)] - head.centre[static_cast<size_t>(i)];
    p.k_halves[static_cast<size_t>(page)] = half;
  }
  for (int r = 0; r < shape.rows; r++)
    for (int d = dim; d < DK; d++) p.q[static_cast<size_t>(r * DK + d)] = 0;
  Profile profile;
  profile.shape = {1, 1, dim, dim};
  profile.k.push_back(head);
  const std::vector<std::byte> tables = cuda::MakeLevelTables(profile, type);
  cuda::LevelUnit<DK> unit;
  std::memcpy(&unit, tables.data() + Tables::kUnit, sizeof unit);
  std::vector<uint8_t> rows(Tile::kRows * DK * 4), turned(rows.size());
  Check<Tile, DK, DK>(
      p, shape, limit,
      [&](WarpRow<DK>& row, float key_scale, int r, uint8_t* area) {
        cuda::StoreLevelRow<EmulatedWarp, DK>(row, r, rows.data());
        EmulatedWarp::Sync();
        for (int warp = 0; warp < Tile::kRows; warp++)
          cuda::TurnLevelRows<EmulatedWarp, DK, Tile::kRows>(rows.data(), tables.data(), warp, turned.data());
        EmulatedWarp::Sync();
        float bias = 0;
        const float value = cuda::WriteLevelQuery<EmulatedWarp, DK>(row, key_scale, r, tables.data(),
                                                                    turned.data(), area, bias);
        double expected = 0;
        for (int i = 0; r < shape.rows && i < dim; i++)
          expected += static_cast<double>(p.q[static_cast<size_t>(r * DK + i)]) *
                      static_cast<double>(head.centre[static_cast<size_t>(i)]);
        EXPECT_NEAR(static_cast<double>(bias), expected, 1e-4) << "row " << r;
        return value;
      },
      LevelKeys<DK>{unit});
}

TEST(LevelTile, EveryTypeAgainstFloat64) {
  CheckLevels<4, Turbo4, 128, 1>(test::TideHead(128, 1), {8, 130, 1.0f}, 1);
  CheckLevels<3, Turbo3, 128, 1>(test::TideHead(128, 2), {5, 64, 1.0f}, 2);
  CheckLevels<2, Turbo2, 128, 1>(test::TideHead(128, 3), {8, 200, 1.0f}, 3);
  CheckLevels<3, Turbo3, 64, 1>(test::TideHead(64, 4), {8, 100, 1.0f}, 4);
  CheckLevels<1, Turbo2, 128, 1>(test::TideHead(128, 9), {8, 130, 1.0f}, 9);
  CheckLevels<1, Turbo2, 64, 1>(test::TideHead(64, 10), {8, 100, 1.0f}, 10);
}

TEST(LevelTile, SixteenRowsAndPaddedHeads) {
  CheckLevels<3, Turbo3, 128, 2>(test::TideHead(128, 5), {16, 130, 1.0f}, 5);
  CheckLevels<2, Turbo2, 64, 2>(test::TideHead(64, 6), {11, 70, 1.0f}, 6);
  CheckLevels<3, Turbo3, 128, 1>(test::TideHead(112, 7), {8, 64, 1.0f}, 7);
  CheckLevels<3, Turbo3, 64, 1>(test::TideHead(48, 8), {8, 64, 1.0f}, 8);
  CheckLevels<1, Turbo2, 128, 2>(test::TideHead(112, 11), {13, 64, 1.0f}, 11);
}

// Every width beside every other one in a step: uniform steps, mixed ones, no wide group at all and only wide
// ones; steps of two groups of every width, in front and behind.
TEST(LevelTile, EveryMixOfWidths) {
  const auto with = [](const std::vector<uint8_t>& widths) {
    HeadProfile head = test::TideHead(64, 9);
    std::copy(widths.begin(), widths.end(), head.widths.begin());
    return head;
  };
  unsigned seed = 20;
  for (const std::vector<uint8_t>& widths : kMixedWidths)
    CheckLevels<4, Turbo4, 64, 1>(with(widths), {8, 64, 1.0f}, seed++);
}

TEST(WarpEmulator, PermuteReplicatesSigns) {
  EXPECT_EQ(EmulatedWarp::Prmt(0x03020180u, 0x07060504u, 0x4321u), 0x04030201u);
  EXPECT_EQ(EmulatedWarp::Prmt(0x03020180u, 0x07060504u, 0x8988u), 0xff00ffffu);
}

TEST(CodedTile, EveryWidthAgainstFloat64) {
  CheckCoded<Turbo4, Turbo4, 128, 128, 1>({8, 200, 1.0f}, 1);
  CheckCoded<Wht4, Wht4, 128, 128, 1>({8, 200, 1.0f}, 2);
  CheckCoded<Turbo3, Turbo3, 128, 128, 1>({5, 130, 1.0f}, 3);
  CheckCoded<Turbo2, Turbo2, 128, 128, 1>({3, 64, 1.0f}, 4);
  CheckCoded<Q8_0, Q8_0, 128, 128, 1>({8, 130, 1.0f}, 5);
  CheckCoded<Q5_0, Q5_0, 128, 128, 1>({8, 130, 1.0f}, 6);
  CheckCoded<Q4_0, Q4_0, 128, 128, 1>({8, 130, 1.0f}, 7);
}

TEST(CodedTile, MixedPairs) {
  CheckCoded<Q8_0, Turbo4, 128, 128, 1>({8, 65, 0.05f}, 11);
  CheckCoded<Turbo4, Turbo3, 128, 128, 1>({8, 63, 1.0f}, 12);
  CheckCoded<Turbo3, Q4_0, 128, 128, 1>({8, 1, 1.0f}, 13);
  CheckCoded<Turbo2, Turbo4, 64, 64, 1>({8, 100, 1.0f}, 14);
  CheckCoded<Turbo4, Wht4, 128, 128, 1>({8, 130, 1.0f}, 15);
  CheckCoded<Wht4, Turbo4, 64, 64, 1>({8, 100, 1.0f}, 16);
  CheckCoded<Q8_0, Wht4, 128, 128, 2>({16, 130, 0.05f}, 17);
}

TEST(CodedTile, HeadDimsAndSixteenRows) {
  CheckCoded<Turbo4, Turbo4, 64, 64, 1>({8, 100, 1.0f}, 21);
  CheckCoded<Turbo3, Turbo3, 64, 64, 2>({16, 100, 1.0f}, 22);
  CheckCoded<Turbo3, Turbo3, 96, 96, 1>({8, 100, 1.0f}, 23);
  CheckCoded<Turbo4, Turbo4, 192, 128, 1>({8, 70, 1.0f}, 24);
  CheckCoded<Turbo4, Turbo4, 256, 256, 1>({8, 70, 1.0f}, 25);
  CheckCoded<Turbo3, Turbo3, 512, 512, 1>({8, 70, 1.0f}, 26);
  CheckCoded<Turbo4, Turbo4, 128, 128, 2>({13, 150, 1.0f}, 27);
  CheckCoded<Wht4, Wht4, 128, 128, 2>({13, 150, 1.0f}, 28);
  CheckCoded<Wht4, Wht4, 96, 96, 1>({8, 100, 1.0f}, 29);
  CheckCoded<Wht4, Wht4, 256, 256, 1>({8, 70, 1.0f}, 30);
}

// Weights must not wrap: the reference exponent is rounded, which a fixed ceiling of 65535 would not survive.
TEST(CodedTile, LargeLogitsWithEqualScales) {
  for (unsigned seed = 0; seed < 4; seed++) {
    CheckCoded<Turbo4, Turbo4, 128, 128, 1>({8, 300, 100.0f, true}, 30 + seed, 3e-2f);
    CheckCoded<Turbo3, Turbo3, 128, 128, 1>({8, 300, 1000.0f, true}, 40 + seed, 0.3f);
    CheckCoded<Q4_0, Q4_0, 128, 128, 1>({8, 300, 100.0f, true}, 50 + seed, 3e-2f);
    CheckCoded<Wht4, Wht4, 128, 128, 1>({8, 300, 100.0f, true}, 60 + seed, 3e-2f);
  }
}

// A page of which a row sees nothing, before and after it has seen something.
TEST(CodedTile, PagesThatAreMasked) {
  CheckCoded<Turbo4, Turbo4, 128, 128, 1>({8, 200, 1.0f, false, 70}, 71);
  CheckCoded<Turbo3, Turbo3, 64, 64, 2>({13, 300, 1.0f, false, 130}, 72);
  CheckCoded<Q8_0, Q4_0, 128, 128, 1>({8, 200, 0.05f, false, 64}, 73);
  CheckCoded<Wht4, Wht4, 64, 64, 1>({8, 200, 1.0f, false, 70}, 75);
  CheckHalf<false, 128, 128, 1, 32>({8, 200, 1.0f, false, 70}, 74);
}

TEST(HalfTile, AgainstFloat64) {
  CheckHalf<false, 128, 128, 1, 32>({8, 200, 1.0f}, 61);
  CheckHalf<false, 64, 64, 2, 64>({16, 100, 1.0f}, 62);
  CheckHalf<false, 96, 96, 1, 32>({8, 100, 1.0f}, 63);
  CheckHalf<false, 256, 256, 1, 16>({8, 65, 1.0f}, 64);
  CheckHalf<true, 128, 128, 1, 32>({8, 130, 1.0f}, 65);
  CheckHalf<false, 128, 128, 1, 32>({8, 130, 100.0f}, 66);
}

// What counts is the query times the scale, down to the smallest queries; and a scale may be negative.
TEST(QueryRow, TinyQueriesAndAnyScale) {
  for (const float magnitude : {1e-16f, 1e-20f, 1e-30f, 1e-37f})
    for (const float sign : {1.0f, -1.0f}) {
      SCOPED_TRACE(::testing::Message() << "queries of " << magnitude << ", sign " << sign);
      const float scale = sign / magnitude;
      CheckCoded<Turbo4, Turbo4, 128, 128, 1>({8, 130, magnitude, false, 0, scale}, 81);
      CheckCoded<Q4_0, Q4_0, 64, 64, 2>({16, 100, magnitude, false, 30, scale}, 82);
      CheckHalf<false, 128, 128, 1, 32>({8, 130, magnitude, false, 70, scale}, 83);
      CheckHalf<true, 64, 64, 1, 64>({8, 100, magnitude, false, 0, scale}, 84);
    }
}
// Tiny queries whose logits vanish see all tokens alike, as queries of zero do.
TEST(QueryRow, WhatVanishesSeesAllTokensAlike) {
  for (const float magnitude : {0.0f, 1e-12f, 1e-30f, 1e-40f}) {
    SCOPED_TRACE(::testing::Message() << "queries of " << magnitude);
    CheckCoded<Turbo4, Turbo4, 128, 128, 1>({8, 130, magnitude, false, 70}, 91);
    CheckHalf<false, 128, 128, 1, 32>({8, 130, magnitude, false, 70}, 92);
  }
}

template <int D>
void CheckRotation() {
  std::mt19937 rng(D);
  std::normal_distribution<float> normal;
  std::vector<float> x(D), forward(D), back(D);
  for (float& v : x) v = normal(rng);
  std::vector<float> expected = x;
  RotateForward(TypeOf("turbo4"), expected.data(), D);
  RunWarp([&](int lane) {
    WarpRow<D> row;
    const auto each = [&](auto f) {
      for (int b = 0; b < WarpRow<D>::kBlocks; b++)
        for (int i = 0; i < 4; i++)
          if (128 * b + 4 * lane + i < D)
            f(row.x[b][i], static_cast<size_t>(128 * b + 4 * lane + i));
          else
            row.x[b][i] = 0;
    };
    each([&](float& v, size_t d) { v = x[d]; });
    cuda::RotateHadamard<EmulatedWarp, D, false>(row);
    each([&](float& v, size_t d) { forward[d] = v; });
    cuda::RotateHadamard<EmulatedWarp, D, true>(row);
    each([&](float& v, size_t d) { back[d] = v; });
  });
  for (size_t d = 0; d < D; d++) {
    EXPECT_NEAR(forward[d], expected[d], 1e-5f) << D;
    EXPECT_NEAR(back[d], x[d], 1e-5f) << D;
  }
}

TEST(QueryRow, RotationIsTheFormats) {
  CheckRotation<64>();
  CheckRotation<96>();
  CheckRotation<128>();
  CheckRotation<192>();
  CheckRotation<224>();
  CheckRotation<256>();
  CheckRotation<512>();
}

}  // namespace
}  // namespace kvtide
