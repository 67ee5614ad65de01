// Attention of one warp over pages of calibrated keys (format/tide.h) and coded values: keys are rebuilt in
// registers, values go the way of CodedTile.
//
// A page's coefficients are decoded once, as the A fragments of m16n8k16 products: a lane's bit planes become
// eight codes in a word by two exchanges of index bits, and two codes at a time are looked up as two halves.
// Their products with the inverse transform (TideTables, read through L1) are keys of which a thread has both
// channels of a pair that RoPE turns, and stand where the B fragments of the queries' products want them: no
// key is ever stored. RoPE of the token within the page is applied to the keys, that of the page's first
// token is taken back from the queries, once for a page.
//
// Queries are split in a rounded half and the rest, as in HalfTile. Widths may differ from lane to lane and
// tables from page to page; the rest of a head's data is the unit's.
#pragma once

#include "kernels/cuda/attend/coded_tile.h"
#include "kernels/cuda/attend/query_row.h"
#include "kernels/cuda/device/tide_tables.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {

// In the query area, behind the range of the unit.
struct alignas(16) TideUnit {
  const std::byte* tables = nullptr;  // of the head
  int64_t position = 0;               // of page 0's first token
};

// One warp writes query row `r` for rebuilt keys: q / max in f32, where its channels' pairs are. Returns max
// times |scale| and the unit of the head's keys; the sign of the scale is the row's.
template <class W, int D>
KVTIDE_DEVICE float WriteTideQuery(WarpRow<D>& row, float scale, int r, const std::byte* tables,
                                   typename W::Shared area) {
  using Tables = TideTables<D>;
  const auto [inverse, unit] = Divide<W, D>(row, 1.0f, scale);
  const int lane = W::Lane();
  const typename W::Shared to = area + r / 8 * (Tables::kSteps * 512) + r % 8 * 64;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    if (4 * lane >= D) continue;
    const uint32_t places = W::LoadTableWord(tables + Tables::kPlaces + (4 * lane + i) * 2);
    W::Store32(to + 4 * (places & 0xffffu), W::Bits(row.x[0][i] * inverse));
    W::Store32(to + 4 * (places >> 16), W::Bits(row.x[0][i + 1] * inverse));
  }
  return unit * W::Float(W::LoadTableWord(tables + Tables::kUnit));
}

// kKeyBits: of the type, for the bytes of a page; kQuarters: quarters of a page that are rebuilt at once.
template <class W, int kKeyBits, class VCodec, int DK, int DV, int MT, int kQuarters>
struct TideTile : CodedTile<W, VCodec, VCodec, DK, DV, MT> {
  using Values = CodedTile<W, VCodec, VCodec, DK, DV, MT>;
  using Shared = typename W::Shared;
  using Tables = TideTables<DK>;
  static constexpr int kKCodeBytes = TideUnits(kKeyBits, DK) * kTideUnitBytes;
  static constexpr int kKBytes = kKCodeBytes + kTideGainBytes;
  static constexpr int kVPieceOffset(int) { return kKBytes; }
  static constexpr float kKUnit = 1;
  static constexpr int kLogits = Values::kLogits;

  // Query rows in f32, in the order of lanes: [8 rows][step][lane] of both channels of two pairs.
  static constexpr int kQueryFragmentBytes = MT * Tables::kSteps * 512, kQueryBytes = kQueryFragmentBytes;
  // A warp's own: cosines and sines of the page's first token.
  static constexpr int kScratchBytes = DK / 4 * 16;

  // Lookup: for widths 0 to 4, two halves for two codes of 4 bits; then for every width a half for a code of
  // 6 bits. Bits above the width are ignored.
  static constexpr int kPairBytes = 1024, kSinglesAt = 5 * kPairBytes, kSingleBytes = 128,
                       kLookupBytes = kSinglesAt + (kMostTideWidth + 1) * kSingleBytes;
  static constexpr int kTableBytes = Values::kTableBytes + 2 * kPairBytes + kLookupBytes;
  static KVTIDE_DEVICE Shared Lookup(Shared area) { return W::Align(area + Values::kTableBytes, kPairBytes); }

  Shared scratch, lookup;
  const std::byte* tables;
  int64_t position;
  int page;

  static KVTIDE_DEVICE float Coefficient(int width, int code) {
    return static_cast<float>(TideLevel(width, code & ((1 << width) - 1))) / TideSigma(width) *
           kCoefficientUnit;
  }
  // Where two codes of 4 bits, or four times two, have their coefficients: 3 bits and fewer spread over all
  // banks.
  static KVTIDE_DEVICE uint32_t PairPlace(uint32_t codes) { return codes ^ (codes >> 2 & 0x08080808u); }
  // Thread `thread` of `threads` writes its part.
  static KVTIDE_DEVICE void WriteLookup(Shared area, int thread, int threads) {
    const Shared at = Lookup(area);
    for (int i = thread; i < 5 * kPairBytes / 8; i += threads) {
      const int width = i / 128, code = 2 * (i % 128);
      const float high = Coefficient(width, code >> 4);
      W::Store64(at + i / 128 * kPairBytes + 4 * PairPlace(code),
                 W::template Pack<false>(Coefficient(width, code), high),
                 W::template Pack<false>(Coefficient(width, code + 1), high));
    }
    for (int i = thread; i < (kMostTideWidth + 1) * kSingleBytes / 8; i += threads) {
      const int width = i / 16, code = 4 * (i % 16);
      W::Store64(at + kSinglesAt + 8 * i,
                 W::template Pack<false>(Coefficient(width, code), Coefficient(width, code + 1)),
                 W::template Pack<false>(Coefficient(width, code + 2), Coefficient(width, code + 3)));
    }
  }
  KVTIDE_DEVICE void InitKeys(Shared area, Shared own) {
    lookup = Lookup(area);
    scratch = own;
  }
  KVTIDE_DEVICE void BeginUnit(const TideUnit& unit) {
    tables = unit.tables;
    position = unit.position;
  }
  KVTIDE_DEVICE void BeginPage(int number) { page = number; }

  // RoPE of the page's first token: cosines and sines of pairs 2l and 2l + 1 at 16 l.
  KVTIDE_DEVICE void TurnPage() {
    const int lane = W::Lane();
    const uint64_t first = static_cast<uint64_t>(position + int64_t{page} * kBlockTokens);
    if (lane < DK / 4) {
      uint32_t w[4];
      W::LoadTable(tables + Tables::kPhases + 16 * lane, w);
      CosSin angle[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const uint64_t per_position = static_cast<uint64_t>(w[2 * e + 1]) << 32 | w[2 * e];
        angle[e] = CosSinOf(static_cast<uint32_t>((per_position * first) >> 32));
      }
      W::Store64(scratch + 16 * lane, W::Bits(angle[0].cos), W::Bits(angle[1].cos));
      W::Store64(scratch + 16 * lane + 8, W::Bits(angle[0].sin), W::Bits(angle[1].sin));
    }
    W::Sync();
  }

  // Of 8 codes, whose bit b is bit e of byte b: codes of 4 bits, those of j and j + 4 in byte j.
  static KVTIDE_DEVICE uint32_t Transpose(uint32_t planes) {
    uint32_t x = planes, t = (x ^ (x >> 14)) & 0x0000ccccu;
    x ^= t * 0x4001u;  // to where they come from as well
    t = (x ^ (x >> 7)) & 0x00aa00aau;
    return x ^ t * 0x81u;
  }
  // Their coefficients, those of j and j + 4 in a[j].
  static KVTIDE_DEVICE void LookUp(uint32_t codes, Shared pair_table, uint32_t (&a)[4]) {
    const uint32_t places = PairPlace(codes);
    a[0] = W::Load32(W::Join(pair_table, (places << 2) & 0x3fcu));
    a[1] = W::Load32(W::Join(pair_table, (places >> 6) & 0x3fcu));
    a[2] = W::Load32(W::Join(pair_table, (places >> 14) & 0x3fcu));
    a[3] = W::Load32(W::Join(pair_table, (places >> 22) & 0x3fcu));
  }
  // The same for codes of up to 6 bits; `above`: bits 4 and 5 as two planes.
  static KVTIDE_DEVICE void LookUpWide(uint32_t codes, uint32_t above, Shared single_table,
                                       uint32_t (&a)[4]) {
    const uint32_t high = Transpose(above);
    const uint32_t first = (codes & 0x0f0f0f0fu) | (high & 0x0f0f0f0fu) << 4,
                   second = (codes >> 4 & 0x0f0f0f0fu) | (high & 0xf0f0f0f0u);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t low = W::Load16(W::Join(single_table, Twice(first, j))),
                     rest = W::Load16(W::Join(single_table, Twice(second, j)));
      a[j] = W::Prmt(low, rest, 0x5410u);
    }
  }
  // Twice byte j, which is below 64.
  static KVTIDE_DEVICE uint32_t Twice(uint32_t bytes, int j) {
    return (j == 0 ? bytes << 1 : bytes >> (8 * j - 1)) & 0x7eu;
  }

  // Coefficients of the quarters from `first` on, times gains, of step `step` of 4 groups.
  KVTIDE_DEVICE void LoadStep(Shared k_half, uint32_t groups, int first,
                              const uint32_t (&gains)[kQuarters][2], uint32_t (&low)[kQuarters][4],
                              uint32_t (&high)[kQuarters][4]) const {
    const int lane = W::Lane(), n = lane >> 2, c = lane & 3;
    const int width = static_cast<int>(groups >> 8 & 255u), most = static_cast<int>(groups >> 16);
    const Shared bytes = k_half + static_cast<int>(groups & 255u) * kTideUnitBytes + 2 * (n ^ (2 * c));
    const Shared pairs = lookup + (width <= 4 ? width : 0) * kPairBytes,
                 singles = lookup + kSinglesAt + width * kSingleBytes;
#pragma unroll
    for (int q = 0; q < kQuarters; q++) {
      const Shared at = bytes + (first + q) * 16;
      uint32_t plane[4] = {0, 0, 0, 0};
#pragma unroll
      for (int b = 0; b < 4; b++)
        if (b < width) plane[b] = W::Load16(at + b * kTideUnitBytes);
      const uint32_t x = W::Prmt(plane[0], plane[1], 0x5410u), y = W::Prmt(plane[2], plane[3], 0x5410u);
      const uint32_t codes[2] = {Transpose(W::Prmt(x, y, 0x6420u)), Transpose(W::Prmt(x, y, 0x7531u))};
      uint32_t a[2][4];
      if (most <= 4) {
        LookUp(codes[0], pairs, a[0]);
        LookUp(codes[1], pairs, a[1]);
      } else {
        uint32_t above[2] = {0, 0};
        if (width > 4) above[0] = W::Load16(at + 4 * kTideUnitBytes);
        if (width > 5) above[1] = W::Load16(at + 5 * kTideUnitBytes);
        const uint32_t both = W::Prmt(above[0], above[1], 0x5410u);
        LookUpWide(codes[0], W::Prmt(both, 0, 0x4420u), singles, a[0]);
        LookUpWide(codes[1], W::Prmt(both, 0, 0x4431u), singles, a[1]);
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        low[q][h] = W::HalfMul(a[h][0], gains[q][h]);
        low[q][2 + h] = W::HalfMul(a[h][1], gains[q][h]);
        high[q][h] = W::HalfMul(a[h][2], gains[q][h]);
        high[q][2 + h] = W::HalfMul(a[h][3], gains[q][h]);
      }
    }
  }

  // The A fragment of 8 query rows: their rounded halves in rows 0-7, the rest in rows 8-15.
  KVTIDE_DEVICE void LoadQueryStep(int m, int s, const float (&turn)[4], uint32_t (&a)[4]) const {
    uint32_t w[4];
    W::Load128(this->query + (m * Tables::kSteps + s) * 512 + 16 * W::Lane(), w);
    float q[4];
#pragma unroll
    for (int i = 0; i < 4; i++) q[i] = W::Float(w[i]);
    float turned[4];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      turned[e] = W::Fma(q[2 + e], turn[2 + e], q[e] * turn[e]);
      turned[2 + e] = W::Fma(-q[e], turn[2 + e], q[2 + e] * turn[e]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      a[2 * i] = W::template Pack<false>(turned[2 * i], turned[2 * i + 1]);
      float low, high;
      W::HalfPair(a[2 * i], low, high);
      a[2 * i + 1] = W::template Pack<false>(turned[2 * i] - low, turned[2 * i + 1] - high);
    }
  }

  // Logits of the quarters whose coefficients are in `a`, of which kUsed steps have bits.
  template <int kUsed>
  KVTIDE_DEVICE void Multiply(const uint32_t (&a)[2 * Tables::kGroupSteps][kQuarters][4], int first,
                              float (&logits)[MT][2 * kQuarters][4]) const {
    const std::byte* step = tables + 16 * W::Lane();
    Shared turns = scratch + 16 * (W::Lane() & 3);
#pragma unroll 1
    for (int s = 0; s < Tables::kSteps; s++, step += Tables::kStepBytes, turns += 64) {
      float keys[kQuarters][2][4];
      {
        float centre[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          uint32_t w[4];
          W::LoadTable(step + Tables::kCentre + i * 512, w);
#pragma unroll
          for (int e = 0; e < 4; e++) centre[i][e] = W::Float(w[e]);
        }
#pragma unroll
        for (int k = 0; k < 2 * kUsed; k++) {
          uint32_t b[4];
          W::LoadTable(step + Tables::kInverse + k * 512, b);
#pragma unroll
          for (int q = 0; q < kQuarters; q++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              if (k == 0)
                W::MmaHalfFrom(keys[q][i], a[k][q], b[2 * i], b[2 * i + 1], centre[i]);
              else
                W::template MmaHalf<false>(keys[q][i], a[k][q], b[2 * i], b[2 * i + 1]);
            }
        }
      }
      uint32_t query_part[MT][4];
      {
        uint32_t w[4];
        W::Load128(turns, w);
        const float turn[4] = {W::Float(w[0]), W::Float(w[1]), W::Float(w[2]), W::Float(w[3])};
#pragma unroll
        for (int m = 0; m < MT; m++) LoadQueryStep(m, s, turn, query_part[m]);
      }
#pragma unroll
      for (int q = 0; q < kQuarters; q++) {
        uint32_t turn[4];
        W::LoadTable(step + Tables::kRope + (first + q) * 512, turn);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint32_t one = W::template Pack<false>(keys[q][0][2 * h], keys[q][0][2 * h + 1]),
                         two = W::template Pack<false>(keys[q][1][2 * h], keys[q][1][2 * h + 1]);
          const uint32_t cosine = turn[2 * h], sine = turn[2 * h + 1];
          const uint32_t b0 = W::HalfFma(W::HalfNegative(two), sine, W::HalfMul(one, cosine)),
                         b1 = W::HalfFma(one, sine, W::HalfMul(two, cosine));
#pragma unroll
          for (int m = 0; m < MT; m++)
            W::template MmaHalf<false>(logits[m][2 * q + h], query_part[m], b0, b1);
        }
      }
    }
  }

  KVTIDE_DEVICE void KeyStage(Shared k_half, int /*tile*/, float (&y)[MT][kLogits]) {
    const int lane = W::Lane(), c = lane & 3;
    TurnPage();
    uint32_t groups[4];
    W::LoadTable(tables + Tables::kGroups + 16 * c, groups);
    const auto used = static_cast<int>(W::LoadTableWord(tables + Tables::kUsed));
#pragma unroll
    for (int first = 0; first < 4; first += kQuarters) {
      uint32_t a[2 * Tables::kGroupSteps][kQuarters][4];
      {
        uint32_t gains[kQuarters][2];
#pragma unroll
        for (int q = 0; q < kQuarters; q++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const uint32_t byte =
                W::Load8(k_half + kKCodeBytes + Tables::TokenOf(first + q, lane >> 2, h == 1));
            const float gain =
                byte == 0 ? 0.0f : W::Ex2(static_cast<float>(static_cast<int>(byte) - 1) * 0.0625f);
            gains[q][h] = W::template Pack<false>(gain, gain);
          }
#pragma unroll
        for (int step = 0; step < Tables::kGroupSteps; step++)
          if (step < used) LoadStep(k_half, groups[step], first, gains, a[2 * step], a[2 * step + 1]);
      }
      float logits[MT][2 * kQuarters][4];
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 2 * kQuarters; i++)
          logits[m][i][0] = logits[m][i][1] = logits[m][i][2] = logits[m][i][3] = 0;
      if (used == Tables::kGroupSteps) {
        Multiply<Tables::kGroupSteps>(a, first, logits);
      } else if (used == 1) {
        Multiply<1>(a, first, logits);
      } else if constexpr (Tables::kGroupSteps > 2) {
        if (used == 2)
          Multiply<2>(a, first, logits);
        else
          Multiply<3>(a, first, logits);
      }
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 2 * kQuarters; i++)
#pragma unroll
          for (int e = 0; e < 2; e++) y[m][4 * first + 2 * i + e] = logits[m][i][e] + logits[m][i][2 + e];
    }
  }
};

}  // namespace kvtide::cuda
