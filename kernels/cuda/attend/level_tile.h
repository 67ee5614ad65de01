// Attention of one warp over pages of calibrated keys that are coded after RoPE (format/tide.h) and coded
// values: queries are turned into the frame of the stored levels once (WriteLevelQuery), keys are integer
// products with levels, times the token's gain; values go the way of CodedTile.
//
// Levels come from LevelDecoder. In a step of four groups (LevelTables) a lane has one for 8 tokens, 4 of
// each half of the page; in a step of two it has one for 4 tokens, lanes of even c those of the first half,
// and takes part in two products, of which the one that is not meant finds zeros for its queries. Levels of
// codes of 4 bits come in two parts, whose sum is taken by two products.
#pragma once

#include <cstddef>

#include "kernels/cuda/attend/coded_tile.h"
#include "kernels/cuda/attend/level_decoder.h"
#include "kernels/cuda/attend/query_row.h"
#include "kernels/cuda/device/level_tables.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {

// Query rows of a unit are turned by as many warps: a warp has a few words of 4 columns for all of them, so
// that the matrix is read once. Rows before and after are floats, [kRows][D], in shared memory; all warps
// meet before and after TurnLevelRows.
template <class W, int D>
KVTIDE_DEVICE void StoreLevelRow(const WarpRow<D>& row, int r, typename W::Shared rows) {
  const int lane = W::Lane();
  if (4 * lane >= D) return;
  const typename W::Shared to = rows + (r * D + 4 * lane) * 4;
  W::Store64(to, W::Bits(row.x[0][0]), W::Bits(row.x[0][1]));
  W::Store64(to + 8, W::Bits(row.x[0][2]), W::Bits(row.x[0][3]));
}
template <class W, int D, int kRows>
KVTIDE_DEVICE void TurnLevelRows(typename W::Shared rows, const std::byte* tables, int part,
                                 typename W::Shared turned) {
  // A lane sums over some channels; at the end it has one row.
  constexpr int kWords = 32 / kRows;
  const int lane = W::Lane(), group = lane / kWords, word = part * kWords + lane % kWords;
  if (4 * kWords * part >= D) return;
  float sum[kRows][4] = {};
#pragma unroll
  for (int step = 0; step < (D / 4 + kRows - 1) / kRows; step++) {
    const int channel = 4 * (step * kRows + group);
    if (D / 4 % kRows != 0 && channel >= D) continue;
    float w[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t bits[4];
      W::LoadTable(tables + LevelTables<D>::kMatrix + ((channel + i) * D + 4 * word) * 4, bits);
#pragma unroll
      for (int e = 0; e < 4; e++) w[i][e] = W::Float(bits[e]);
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      uint32_t q[4];
      W::Load128(rows + (r * D + channel) * 4, q);
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[r][e] = W::Fma(W::Float(q[i]), w[i][e], sum[r][e]);
    }
  }
#pragma unroll
  for (int step = 1; step < kRows; step *= 2) {
    const int half = kRows / 2 / step;
    const bool upper = (group & half) != 0;
#pragma unroll
    for (int r = 0; r < kRows / 2; r++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (r >= half) continue;
        const float kept = upper ? sum[r + half][e] : sum[r][e], given = upper ? sum[r][e] : sum[r + half][e];
        sum[r][e] = kept + W::ShflXor(given, half * kWords);
      }
  }
  const typename W::Shared to = turned + (group * D + 4 * word) * 4;
  W::Store64(to, W::Bits(sum[0][0]), W::Bits(sum[0][1]));
  W::Store64(to + 8, W::Bits(sum[0][2]), W::Bits(sum[0][3]));
}

// One warp writes query row `r` for levels, as WriteCodedQuery does, with what TurnLevelRows made of it.
// `bias`: q . centre, which belongs to the product with every key. Returns what one unit of the integer sum
// is worth, times |scale|.
template <class W, int D>
KVTIDE_DEVICE float WriteLevelQuery(const WarpRow<D>& row, float scale, int r, const std::byte* tables,
                                    typename W::Shared turned_rows, typename W::Shared area, float& bias) {
  using Tables = LevelTables<D>;
  static_assert(Tables::kColumns == D);
  const int lane = W::Lane();
  const auto of_unit = [tables](size_t at) {
    return static_cast<int>(W::LoadTableWord(tables + Tables::kUnit + at));
  };
  const int lead = of_unit(offsetof(LevelUnit<D>, lead)), words = of_unit(offsetof(LevelUnit<D>, words)),
            all_words = words + (of_unit(offsetof(LevelUnit<D>, tail)) > 0 ? 4 : 0);
  WarpRow<D> turned = {};
  bias = 0;
  if (4 * lane < D) {
    uint32_t centre[4], columns[4];
    W::LoadTable(tables + Tables::kCentre + 16 * lane, centre);
    W::Load128(turned_rows + (r * D + 4 * lane) * 4, columns);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      bias = W::Fma(row.x[0][i], W::Float(centre[i]), bias);
      turned.x[0][i] = W::Float(columns[i]);
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) bias += W::ShflXor(bias, mask);

  const auto [inverse, unit] = Divide<W, D>(turned, 32639.0f, scale);
  uint32_t high_word = 0, low_word = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int q = W::Round(turned.x[0][i] * inverse);
    const int high = (q + 128) >> 8, low = q - high * 256;
    high_word |= static_cast<uint32_t>(high & 255) << (8 * i);
    low_word |= static_cast<uint32_t>(low & 255) << (8 * i);
  }
  if (lane < all_words)
    W::Store64(area + r / 8 * Tables::kQueryBytes + Tables::PlaceOf(lead, words, lane, r % 8), high_word,
               low_word);
  return unit;
}

#ifdef __CUDACC__
__device__
#endif
    constexpr LevelBytes kStoredLevelBytes = MakeLevelBytes(TideLevel);
struct StoredLevels {
  static constexpr int kOffset = 0;
  static KVTIDE_DEVICE const int8_t* Of(int width) { return kStoredLevelBytes.of[width]; }
};

// kKeyBits: of the type, for the bytes of a page.
template <class W, int kKeyBits, class VCodec, int DK, int DV, int MT>
struct LevelTile : CodedTile<W, VCodec, VCodec, DK, DV, MT> {
  using Values = CodedTile<W, VCodec, VCodec, DK, DV, MT>;
  using Shared = typename W::Shared;
  using Tables = LevelTables<DK>;
  static constexpr int kKCodeBytes = TideUnits(kKeyBits, DK) * kTideUnitBytes;
  static constexpr int kKBytes = kKCodeBytes + kTideGainBytes;
  static constexpr int kVPieceOffset(int) { return kKBytes; }
  static constexpr float kKUnit = 1;
  static constexpr int kLogits = Values::kLogits;
  static constexpr int kQueryFragmentBytes = MT * Tables::kQueryBytes, kQueryBytes = kQueryFragmentBytes;
  using OwnUnit = LevelUnit<DK>;
  // A warp's own: gains of the page's tokens as f32, then the unit's steps, then for every step and lane
  // where its planes begin in the codes of a page, and its row of the lookup.
  static constexpr int kStepsAt = kBlockTokens * 4, kSlotsAt = kStepsAt + 32, kSlotBytes = 32 * 8;
  static constexpr int kScratchBytes = kSlotsAt + OwnUnit::kSteps * kSlotBytes;

  using Levels = LevelDecoder<W, StoredLevels>;
  static constexpr int kLookupAt = (Values::kTableBytes + 15) / 16 * 16;
  static constexpr int kTableBytes = kLookupAt + Levels::kBytes;

  Shared scratch;
  Levels levels;
  // Thread `thread` of `threads` writes its part.
  static KVTIDE_DEVICE void WriteLookup(Shared area, int thread, int threads) {
    Levels::Write(area + kLookupAt, thread, threads);
  }
  KVTIDE_DEVICE void InitKeys(Shared area, Shared own) {
    levels.Init(area + kLookupAt);
    scratch = own;
  }
  KVTIDE_DEVICE void BeginUnit(const OwnUnit& unit) {
    const int lane = W::Lane(), n = lane >> 2, c = lane & 3;
    const int tail = unit.lead + (unit.words - 4 * unit.lead) / 8;  // the step behind quads
    W::Sync();
#pragma unroll
    for (int s = 0; s < OwnUnit::kSteps; s++) {
      const bool pair = s < unit.lead || s == tail;
      const uint32_t slot = unit.slots[s][c];
      // The lane's tokens in a unit, and the half of a page that it has of a pair.
      const int place = 16 * (n & 1) + 4 * (n >> 1) + (pair ? 32 * (c & 1) : 0);
      W::Store64(scratch + kSlotsAt + s * kSlotBytes + 8 * lane,
                 (slot & 0xffffu) ^ static_cast<uint32_t>(place), slot >> 16);
    }
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        W::Store32(scratch + kStepsAt + 4 * i, static_cast<uint32_t>(unit.quads[1 + i]));
      W::Store64(scratch + kStepsAt + 16, static_cast<uint32_t>(unit.lead),
                 static_cast<uint32_t>(unit.quads[0]));
      W::Store64(scratch + kStepsAt + 24, static_cast<uint32_t>(unit.tail), 0);
    }
    W::Sync();
  }
  KVTIDE_DEVICE void BeginPage(int /*number*/) {}

  template <int kWidth>
  KVTIDE_DEVICE auto GroupOf(Shared k_half, Shared slots) const {
    uint32_t slot[2];
    W::Load64(slots, slot);
    return levels.template GroupOf<kWidth>(k_half + static_cast<int>(slot[0]), slot[1]);
  }
  // add(j, b0, b1) adds a product of token j's levels.
  template <int kWidth, class Adds>
  KVTIDE_DEVICE void Decode(const typename Levels::template Group<kWidth>& group, int half,
                            const Adds& add) const {
    levels.template Decode<kWidth>(
        group, half, [this](uint32_t x) { return this->k_decoder.Not(x); }, add);
  }

  static KVTIDE_DEVICE void Add(int (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    W::template MmaBytes<true>(acc, a, b0, b1, acc);
  }
  // Steps of four groups of up to kWidth bits.
  template <int kWidth>
  KVTIDE_DEVICE void Quads(Shared k_half, uint32_t count, Shared& slots, Shared& part,
                           int (&acc)[MT][8][4]) const {
#pragma unroll 1
    for (; count > 0; count--, slots += kSlotBytes, part += 512) {
      const auto group = GroupOf<kWidth>(k_half, slots);
      uint32_t query_part[MT][4];
#pragma unroll
      for (int m = 0; m < MT; m++) W::Load128(part + m * Tables::kQueryBytes, query_part[m]);
#pragma unroll
      for (int half = 0; half < 2; half++)
        Decode<kWidth>(group, half, [&](int j, uint32_t b0, uint32_t b1) {
#pragma unroll
          for (int m = 0; m < MT; m++) Add(acc[m][4 * half + j], query_part[m], b0, b1);
        });
    }
  }
  // A step of two groups of up to kWidth bits; kFirst: it begins the sums.
  template <int kWidth, bool kFirst>
  KVTIDE_DEVICE void Pair(Shared k_half, Shared slots, Shared part, int (&acc)[MT][8][4]) const {
    const int lane = W::Lane();
    const bool second = (lane & 1) != 0;
    const auto group = GroupOf<kWidth>(k_half, slots);
    uint32_t query_part[2][MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const Shared own = part + m * Tables::kQueryBytes - (lane + 1) / 2 * 16,
                   none = levels.lookup + Levels::kZerosAt;
      W::Load128(second ? none : own, query_part[0][m]);
      W::Load128(second ? own : none, query_part[1][m]);
    }
    Decode<kWidth>(group, 0, [&](int j, uint32_t b0, uint32_t b1) {
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int(&sums)[4] = acc[m][4 * half + j];
          if constexpr (kFirst) {
            constexpr int kNone[4] = {0, 0, 0, 0};
            W::template MmaBytes<true>(sums, query_part[half][m], b0, b1, kNone);
          } else {
            Add(sums, query_part[half][m], b0, b1);
          }
        }
    });
  }

  KVTIDE_DEVICE void KeyStage(Shared k_half, int /*tile*/, float (&y)[MT][kLogits]) {
    const int lane = W::Lane(), c = lane & 3;
    {
      const uint32_t bytes = W::Load16(k_half + kKCodeBytes + 2 * lane);
      const auto gain = [](uint32_t byte) {
        return W::Ex2(W::Fma(static_cast<float>(static_cast<int>(byte)), 0.0625f, -0.0625f));
      };
      W::Store64(scratch + 8 * lane, W::Bits(gain(bytes & 255u)), W::Bits(gain(bytes >> 8)));
    }
    int acc[MT][8][4];
    Shared slots = scratch + kSlotsAt + 8 * lane, part = this->query + 16 * lane;
    uint32_t steps[8];
    W::Load128(scratch + kStepsAt, steps);
    W::Load128(scratch + kStepsAt + 16, steps + 4);
    if (steps[4] > 0) {
      Pair<kMostTideWidth, true>(k_half, slots, part, acc);
      slots += kSlotBytes;
      part += 256;
    } else {  // loaded: the compiler would make zeros ahead of the branch, for both sides
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
          uint32_t zeros[4];
          W::Load128(levels.lookup + Levels::kZerosAt, zeros);
#pragma unroll
          for (int e = 0; e < 4; e++) acc[m][i][e] = static_cast<int>(zeros[e]);
        }
    }
    Quads<kMostTideWidth>(k_half, steps[5], slots, part, acc);
    Quads<4>(k_half, steps[0], slots, part, acc);
    Quads<3>(k_half, steps[1], slots, part, acc);
    Quads<2>(k_half, steps[2], slots, part, acc);
    Quads<1>(k_half, steps[3], slots, part, acc);
    if (steps[6] > 2) {
      if (steps[6] > 3)
        Pair<4, false>(k_half, slots, part, acc);
      else
        Pair<3, false>(k_half, slots, part, acc);
    } else if (steps[6] > 0) {
      if (steps[6] > 1)
        Pair<2, false>(k_half, slots, part, acc);
      else
        Pair<1, false>(k_half, slots, part, acc);
    }
    W::Sync();
    // Tile 4 * half + j of the products has, of lane column 2c + e, token 4e + 2 (j % 2) + j / 2 of the
    // lane's 8.
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t gains[8];
      W::Load128(scratch + half * 128 + 32 * c, gains);
      W::Load128(scratch + half * 128 + 32 * c + 16, gains + 4);
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int token = 4 * e + j % 2 * 2 + j / 2;
            const int(&sum)[4] = acc[m][4 * half + j];
            y[m][8 * half + token] = W::ToFloat(sum[e] * 256 + sum[2 + e]) * W::Float(gains[token]);
          }
    }
  }
};

}  // namespace kvtide::cuda
