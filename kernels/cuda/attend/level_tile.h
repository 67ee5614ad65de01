// Attention of one warp over pages of calibrated keys that are coded after RoPE (format/tide.h) and coded
// values: queries are turned into the frame of the stored levels once (WriteLevelQuery), keys are integer
// products with levels, times the token's gain; values go the way of CodedTile.
//
// A lane has the group of coefficients of its step (LevelTables) for 8 tokens, 4 of each half of the page: a
// word of each bit plane, which are made nibbles of codes by exchanges of index bits between words. One byte
// permute takes the four codes of a word of a B fragment together, another looks their levels up in a table
// of 8 entries that depends on the lane's own width (bits above it are ignored, so that lanes of a step may
// differ). Codes of 4 bits are looked up in two tables, of which the one that is not meant answers 0 or -1
// (quad_decoder.h); their sum is taken by two products. Codes of 5 and 6 bits are looked up in shared memory,
// 4 coefficients of two groups at a time. Planes above a lane's width are read all the same, up to 256 bytes
// behind the keys.
#pragma once

#include <cstddef>
#include <type_traits>

#include "kernels/cuda/attend/coded_tile.h"
#include "kernels/cuda/attend/query_row.h"
#include "kernels/cuda/device/level_tables.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {

// One warp writes query row `r` for levels, as WriteCodedQuery does. `bias`: q . centre, which belongs to the
// product with every key. Returns what one unit of the integer sum is worth, times |scale|.
template <class W, int D>
KVTIDE_DEVICE float WriteLevelQuery(const WarpRow<D>& row, float scale, int r, const std::byte* tables,
                                    typename W::Shared area, float& bias) {
  using Tables = LevelTables<D>;
  constexpr int kColumns = Tables::kColumns;
  const int lane = W::Lane();
  const auto wide = static_cast<int>(W::LoadTableWord(tables + Tables::kUnit + offsetof(LevelUnit<D>, wide)));
  const auto columns =
      static_cast<int>(W::LoadTableWord(tables + Tables::kUnit + offsetof(LevelUnit<D>, columns)));
  bias = 0;
  if (4 * lane < D) {
    uint32_t centre[4];
    W::LoadTable(tables + Tables::kCentre + 16 * lane, centre);
#pragma unroll
    for (int i = 0; i < 4; i++) bias = W::Fma(row.x[0][i], W::Float(centre[i]), bias);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) bias += W::ShflXor(bias, mask);

  // Columns 4 * lane and on, by all channels.
  WarpRow<kColumns> turned = {};
  const bool has = 4 * lane < columns;
  const std::byte* const matrix = tables + Tables::kMatrix;
  const std::byte* const from = matrix + (has ? 16 * lane : 0);
#pragma unroll 4
  for (int l = 0; l < D / 4; l++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float q = W::ShflXor(row.x[0][i], lane ^ l);
      uint32_t w[4];
      W::LoadTable(from + (4 * l + i) * (kColumns * 4), w);
#pragma unroll
      for (int e = 0; e < 4; e++) turned.x[0][e] = W::Fma(q, W::Float(w[e]), turned.x[0][e]);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (!has) turned.x[0][e] = 0;
  // The 16 columns that have no lane, by each lane's channels.
  if constexpr (kColumns > 128) {
    if (columns > 128) {
#pragma unroll
      for (int quad = 0; quad < 4; quad++) {
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          uint32_t w[4];
          W::LoadTable(matrix + (4 * lane + i) * (kColumns * 4) + 512 + 16 * quad, w);
#pragma unroll
          for (int e = 0; e < 4; e++) sum[e] = W::Fma(row.x[0][i], W::Float(w[e]), sum[e]);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
#pragma unroll
          for (int mask = 16; mask > 0; mask /= 2) sum[e] += W::ShflXor(sum[e], mask);
          if (lane == quad) turned.x[1][e] = sum[e];
        }
      }
    }
  }

  const auto [inverse, unit] = Divide<W, kColumns>(turned, 32639.0f, scale);
#pragma unroll
  for (int b = 0; b < WarpRow<kColumns>::kBlocks; b++) {
    uint32_t high_word = 0, low_word = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int q = W::Round(turned.x[b][i] * inverse);
      const int high = (q + 128) >> 8, low = q - high * 256;
      high_word |= static_cast<uint32_t>(high & 255) << (8 * i);
      low_word |= static_cast<uint32_t>(low & 255) << (8 * i);
    }
    if (128 * b + 4 * lane < columns)
      W::Store64(area + r / 8 * Tables::kQueryBytes + Tables::PlaceOf(wide, 32 * b + lane, r % 8), high_word,
                 low_word);
  }
  return unit;
}

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
  // A warp's own: gains of the page's tokens as f32, then quads and slots of the unit.
  static constexpr int kQuadsAt = kBlockTokens * 4, kSlotsAt = kQuadsAt + 16,
                       kSlotWords = DK / kTideGroup / 2 * 4;
  static constexpr int kScratchBytes = kSlotsAt + kSlotWords * 4;

  // Lookup, for every width: levels of codes of 6 bits, at multiples of 256 bytes; then 8 entries for codes
  // of 4 bits below 8, of those above, and for codes of 3 bits. Bits above the width are ignored.
  // Then the masks.
  static constexpr int kSingleBytes = 256, kRowsAt = (kMostTideWidth + 1) * kSingleBytes, kRowBytes = 32,
                       kMasksAt = kRowsAt + (kMostTideWidth + 1) * kRowBytes, kLookupBytes = kMasksAt + 16;
  static constexpr int kTableBytes = Values::kTableBytes + kSingleBytes + kLookupBytes;
  static KVTIDE_DEVICE Shared Lookup(Shared area) {
    return W::Align(area + Values::kTableBytes, kSingleBytes);
  }

  Shared scratch, lookup;
  int wide;
  uint32_t lane_place;  // of the lane's tokens in a half of a unit
  // 0x55555555, 0x33333333 and 0x0f0f0f0f, from shared memory: a choice by a constant takes the compiler two
  // instructions instead of one.
  uint32_t even_bits, even_pairs, even_nibbles;

  static KVTIDE_DEVICE int LevelOf(int width, int code) {
    return TideLevel(width, code & ((1 << width) - 1));
  }
  // Entry `i` of a row of 8-entry tables. Of narrower codes both tables of codes of 4 bits mean the same
  // level; the one that is not asked adds the sign, -1 or 0.
  static KVTIDE_DEVICE int RowEntry(int width, int i) {
    if (width > 4) return 0;
    if (i >= 16) return width > 3 ? 0 : LevelOf(width, i - 16);
    if (width == 4) return i < 8 ? LevelOf(4, i) : LevelOf(4, 23 - i) + 1;
    const int level = LevelOf(width, i < 8 ? i : 15 - i);
    return level < 0 ? level + 1 : level;
  }
  // Thread `thread` of `threads` writes its part.
  static KVTIDE_DEVICE void WriteLookup(Shared area, int thread, int threads) {
    const Shared at = Lookup(area);
    if (thread == 0) {
      W::Store64(at + kMasksAt, 0x55555555u, 0x33333333u);
      W::Store64(at + kMasksAt + 8, 0x0f0f0f0fu, 0);
    }
    for (int i = thread; i < kMasksAt / 4; i += threads) {
      uint32_t word = 0;
      for (int e = 0; e < 4; e++) {
        const int byte = 4 * i + e, in_rows = byte - kRowsAt;
        const int level = in_rows < 0 ? LevelOf(byte / kSingleBytes, byte % kSingleBytes)
                                      : RowEntry(in_rows / kRowBytes, in_rows % kRowBytes);
        word |= static_cast<uint32_t>(level & 255) << (8 * e);
      }
      W::Store32(at + 4 * i, word);
    }
  }
  KVTIDE_DEVICE void InitKeys(Shared area, Shared own) {
    lookup = Lookup(area);
    scratch = own;
    const int n = W::Lane() >> 2;
    lane_place = static_cast<uint32_t>(16 * (n & 1) + 4 * (n >> 1));
    uint32_t masks[4];
    W::Load128(lookup + kMasksAt, masks);
    even_bits = masks[0];
    even_pairs = masks[1];
    even_nibbles = masks[2];
  }
  KVTIDE_DEVICE void BeginUnit(const LevelUnit<DK>& unit) {
    wide = unit.wide;
    const int lane = W::Lane();
    W::Sync();
    if (lane < kSlotWords) W::Store32(scratch + kSlotsAt + 4 * lane, unit.slots[lane / 4][lane % 4]);
    if (lane < 4) W::Store32(scratch + kQuadsAt + 4 * lane, static_cast<uint32_t>(unit.quads[lane]));
    W::Sync();
  }
  KVTIDE_DEVICE void BeginPage(int /*number*/) {}

  // Bits of a where the mask has ones, else of b.
  static KVTIDE_DEVICE uint32_t Choose(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
  }
  // Of kWidth planes with bits (other bits, e1, e0): codes of (other bits, b1, b0) in nibbles, by 2 * e1 +
  // e0.
  template <int kWidth>
  KVTIDE_DEVICE void Transpose(const uint32_t* planes, uint32_t (&codes)[4]) const {
    if constexpr (kWidth == 1) {
#pragma unroll
      for (int i = 0; i < 4; i++) codes[i] = planes[0] >> i & 0x11111111u;
    } else {
      const uint32_t x = Choose(even_bits, planes[0], planes[1] << 1),
                     y = Choose(even_bits, planes[0] >> 1, planes[1]);
      if constexpr (kWidth == 2) {
        codes[0] = x & 0x33333333u;
        codes[1] = y & 0x33333333u;
        codes[2] = x >> 2 & 0x33333333u;
        codes[3] = y >> 2 & 0x33333333u;
      } else {
        uint32_t above, beside;
        if constexpr (kWidth == 4) {
          above = Choose(even_bits, planes[2], planes[3] << 1);
          beside = Choose(even_bits, planes[2] >> 1, planes[3]);
        } else {
          above = planes[2] & 0x55555555u;
          beside = planes[2] >> 1 & 0x55555555u;
        }
        codes[0] = Choose(even_pairs, x, above << 2);
        codes[1] = Choose(even_pairs, y, beside << 2);
        codes[2] = Choose(even_pairs, x >> 2, above);
        codes[3] = Choose(even_pairs, y >> 2, beside);
      }
    }
  }

  KVTIDE_DEVICE Shared PlanesOf(Shared k_half, uint32_t slot) const {
    return k_half + static_cast<int>((slot & 0xffffu) ^ lane_place);
  }

  // A step of four groups of up to kWidth bits.
  template <int kWidth>
  KVTIDE_DEVICE void Quad(Shared k_half, Shared slots, Shared part, int (&acc)[MT][8][4]) const {
    const uint32_t slot = W::Load32(slots);
    uint32_t query_part[MT][4], table[4];
#pragma unroll
    for (int m = 0; m < MT; m++) W::Load128(part + m * Tables::kQueryBytes, query_part[m]);
    const Shared planes = PlanesOf(k_half, slot), row = lookup + kRowsAt + static_cast<int>(slot >> 16);
    if constexpr (kWidth == 4)
      W::Load128(row, table);
    else
      W::Load64(row + 16, table);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t plane[kWidth], codes[4];
#pragma unroll
      for (int b = 0; b < kWidth; b++) plane[b] = W::Load32(planes + b * kTideUnitBytes + half * 32);
      Transpose<kWidth>(plane, codes);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t byte = static_cast<uint32_t>(0x40 + 0x11 * j);
        const uint32_t first = W::Prmt(codes[0], codes[1], byte), second = W::Prmt(codes[2], codes[3], byte);
        const uint32_t b0 = W::Prmt(table[0], table[1], first), b1 = W::Prmt(table[0], table[1], second);
#pragma unroll
        for (int m = 0; m < MT; m++) Add(acc[m][4 * half + j], query_part[m], b0, b1);
        if constexpr (kWidth == 4) {
          const uint32_t c0 = W::Prmt(table[2], table[3], this->k_decoder.Not(first)),
                         c1 = W::Prmt(table[2], table[3], this->k_decoder.Not(second));
#pragma unroll
          for (int m = 0; m < MT; m++) Add(acc[m][4 * half + j], query_part[m], c0, c1);
        }
      }
    }
  }
  static KVTIDE_DEVICE void Add(int (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    W::template MmaBytes<true>(acc, a, b0, b1, acc);
  }
  template <int kWidth>
  KVTIDE_DEVICE void Quads(Shared k_half, uint32_t count, Shared& slots, Shared& part,
                           int (&acc)[MT][8][4]) const {
#pragma unroll 1
    for (; count > 0; count--, slots += 16, part += 512) Quad<kWidth>(k_half, slots, part, acc);
  }
  // Where the level of byte `j` of the codes is; the low byte of the table's address is 0.
  static KVTIDE_DEVICE Shared SingleOf(Shared singles, uint32_t codes, int j) {
    if constexpr (std::is_same_v<Shared, uint32_t>)
      return W::Prmt(codes, singles, 0x7650u | static_cast<uint32_t>(j));
    else
      return W::Join(singles, codes >> (8 * j) & 255u);
  }

  // A step of two groups of any width: lanes 2g and 2g + 1 have 4 coefficients of group g each. The first one
  // of a page begins the sums.
  template <bool kFirst>
  KVTIDE_DEVICE void Wide(Shared k_half, Shared slots, Shared part, int (&acc)[MT][8][4]) const {
    const uint32_t slot = W::Load32(slots);
    uint32_t query_part[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      // The second half meets zeros, whatever it is; constants would be put in place again for every product.
      W::Load64(part + m * Tables::kQueryBytes, query_part[m]);
      W::Load64(part + m * Tables::kQueryBytes + 256, query_part[m] + 2);
    }
    const Shared planes = PlanesOf(k_half, slot), singles = lookup + static_cast<int>(slot >> 16) * 8;
    const int from = (W::Lane() & 1) * 4;
    uint32_t plane[kMostTideWidth];
#pragma unroll
    for (int b = 0; b < kMostTideWidth; b++) {
      const uint32_t first = W::Load32(planes + b * kTideUnitBytes),
                     second = W::Load32(planes + b * kTideUnitBytes + 32);
      plane[b] = Choose(even_nibbles, first >> from, second << (4 - from));
    }
    uint32_t low[4];
    Transpose<4>(plane, low);
    // Bits 4 and 5 in the lower half of nibbles; the lookup ignores what the upper one has.
    const uint32_t x = Choose(even_bits, plane[4], plane[5] << 1),
                   y = Choose(even_bits, plane[4] >> 1, plane[5]);
    const uint32_t high[4] = {x, y, x >> 2, y >> 2};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t codes[4];  // bytes of tokens
#pragma unroll
      for (int e = 0; e < 4; e++)
        codes[e] = half == 0 ? Choose(even_nibbles, low[e], high[e] << 4)
                             : Choose(even_nibbles, low[e] >> 4, high[e]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t level[4];
#pragma unroll
        for (int e = 0; e < 4; e++) level[e] = W::Load8(SingleOf(singles, codes[e], j));
        const uint32_t b0 = (level[3] * 256 + level[2]) * 65536 + (level[1] * 256 + level[0]);
        constexpr int kNone[4] = {0, 0, 0, 0};
#pragma unroll
        for (int m = 0; m < MT; m++) {
          if constexpr (kFirst)
            W::template MmaBytes<true>(acc[m][4 * half + j], query_part[m], b0, 0, kNone);
          else
            Add(acc[m][4 * half + j], query_part[m], b0, 0);
        }
      }
    }
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
    Shared slots = scratch + kSlotsAt + 4 * c, part = this->query + 8 * lane;
    if (wide > 0) {
      Wide<true>(k_half, slots, part, acc);
#pragma unroll 1
      for (int s = 1; s < wide; s++) Wide<false>(k_half, slots + 16 * s, part + 256 * s, acc);
    } else {
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 8; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0;
    }
    slots += 16 * wide;
    part += 8 * lane + 256 * wide;
    uint32_t quads[4];
    W::Load128(scratch + kQuadsAt, quads);
    Quads<4>(k_half, quads[0], slots, part, acc);
    Quads<3>(k_half, quads[1], slots, part, acc);
    Quads<2>(k_half, quads[2], slots, part, acc);
    Quads<1>(k_half, quads[3], slots, part, acc);
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
