// Attention of one warp over pages of calibrated keys (format/tide.h) and coded values: keys are rebuilt in
// registers, values go the way of CodedTile.
//
// Levels of 16 tokens (LevelDecoder, two fragments of 8) are the A fragments of integer products with the
// inverse transform (TideTables, read through L1), 8 pairs of channels at a time. A pair's two channels have
// one scale, which is the queries', and a thread holds both. Sums begin at the bits of a float, so one
// addition makes floats of them; as halves they take the token's gain and the mean, and are turned as RoPE
// turns tokens of half a page. They stand then where the A fragments of the products with the queries want
// them: no key is ever stored. RoPE of the first token of each half is taken back from the queries, once for
// a page. Logits come out by tokens and go through shared memory to be by query rows.
//
// Queries and keys are halves. Widths may differ from lane to lane and tables from page to page; the rest of
// a head's data is the unit's.
#pragma once

#include "kernels/cuda/attend/coded_tile.h"
#include "kernels/cuda/attend/level_decoder.h"
#include "kernels/cuda/attend/query_row.h"
#include "kernels/cuda/device/tide_tables.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {

#ifdef __CUDACC__
// What only these tiles ask of a machine.
struct TideWarp : DeviceWarp {
  // Of -pi to pi, within 2^-20.
  static KVTIDE_DEVICE float Cos(float x) { return __cosf(x); }
  static KVTIDE_DEVICE float Sin(float x) { return __sinf(x); }
  static KVTIDE_DEVICE void Store16(Shared address, uint32_t x) {
    asm volatile("st.shared.u16 [%0],%1;" ::"r"(address), "h"(static_cast<uint16_t>(x)) : "memory");
  }
  static KVTIDE_DEVICE void Store128(Shared address, const uint32_t (&w)[4]) {
    asm volatile("st.shared.v4.b32 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                 "r"(w[3])
                 : "memory");
  }
};
#endif

// In the query area, behind the range of the unit.
struct alignas(16) TideUnit {
  const std::byte* tables = nullptr;  // of the head
  int64_t position = 0;               // of page 0's first token
};

// One warp writes query row `r` for rebuilt keys: times the scales of its channels, divided by the largest,
// in halves, where its channels' pairs are. Returns what 1 of a logit is worth, times |scale|; the sign of
// the scale is the row's.
template <class W, int D>
KVTIDE_DEVICE float WriteTideQuery(WarpRow<D>& row, float scale, int r, const std::byte* tables,
                                   typename W::Shared area) {
  using Tables = TideTables<D>;
  const int lane = W::Lane();
  if (4 * lane < D) {
    uint32_t scales[4];
    W::LoadTable(tables + Tables::kScales + 16 * lane, scales);
#pragma unroll
    for (int i = 0; i < 4; i++) row.x[0][i] *= W::Float(scales[i]);
  }
  const auto [inverse, unit] = Divide<W, D>(row, 1.0f, scale);
  const typename W::Shared to = area + r / 8 * (Tables::kSteps * Tables::kQueryStepBytes) + r % 8 * 32;
  if (4 * lane < D) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t places = W::LoadTableWord(tables + Tables::kPlaces + 8 * lane + 4 * i);
      const uint32_t two = W::template Pack<false>(row.x[0][2 * i] * inverse, row.x[0][2 * i + 1] * inverse);
      W::Store16(to + 2 * static_cast<int>(places & 0xffffu), two & 0xffffu);
      W::Store16(to + 2 * static_cast<int>(places >> 16), two >> 16);
    }
  }
  return unit * (1 / kKeyUnit);
}

#ifdef __CUDACC__
__device__
#endif
    constexpr LevelBytes kRebuiltLevelBytes = MakeLevelBytes(RebuiltLevel);
struct RebuiltLevels {
  static constexpr int kOffset = kJoinedOffset;
  static KVTIDE_DEVICE const int8_t* Of(int width) { return kRebuiltLevelBytes.of[width]; }
};

// kKeyBits: of the type, for the bytes of a page; kHalves: halves of a page that are rebuilt at once.
template <class W, int kKeyBits, class VCodec, int DK, int DV, int MT, int kHalves>
struct TideTile : CodedTile<W, VCodec, VCodec, DK, DV, MT> {
  using Values = CodedTile<W, VCodec, VCodec, DK, DV, MT>;
  using Shared = typename W::Shared;
  using Tables = TideTables<DK>;
  using Levels = LevelDecoder<W, RebuiltLevels>;
  static constexpr int kKCodeBytes = TideUnits(kKeyBits, DK) * kTideUnitBytes;
  static constexpr int kKBytes = kKCodeBytes + kTideGainBytes;
  static constexpr int kVPieceOffset(int) { return kKBytes; }
  static constexpr float kKUnit = 1;
  static constexpr int kLogits = Values::kLogits;

  // Query rows as halves, in the order of lanes: [8 rows][step][lane] of first channels of two pairs, then of
  // second ones.
  static constexpr int kQueryFragmentBytes = MT * Tables::kSteps * Tables::kQueryStepBytes,
                       kQueryBytes = kQueryFragmentBytes;
  // A warp's own: for 4s + c what takes back the start of its pairs' keys, then for each half of the page
  // their means and the cosines and sines of its first token, as halves; then logits [row][token].
  static constexpr int kPairBytes = 48, kHalvesAt = 16, kLogitsAt = DK / 4 * kPairBytes,
                       kRowBytes = (kBlockTokens + 4) * 4;
  static constexpr int kScratchBytes = kLogitsAt + 8 * MT * kRowBytes;

  static constexpr int kLookupAt = (Values::kTableBytes + 15) / 16 * 16,
                       kStartAt = kLookupAt + Levels::kBytes;
  static constexpr int kTableBytes = kStartAt + 16;

  Shared scratch;
  Levels levels;
  const std::byte* tables;
  int64_t position;
  int page;

  // Thread `thread` of `threads` writes its part.
  static KVTIDE_DEVICE void WriteLookup(Shared area, int thread, int threads) {
    Levels::Write(area + kLookupAt, thread, threads);
    if (thread < 4) W::Store32(area + kStartAt + 4 * thread, W::Bits(kKeyStart));
  }
  KVTIDE_DEVICE void InitKeys(Shared area, Shared own) {
    levels.Init(area + kLookupAt);
    scratch = own;
  }
  KVTIDE_DEVICE void BeginUnit(const TideUnit& unit) {
    const int lane = W::Lane();
    tables = unit.tables;
    position = unit.position;
    W::Sync();
    if (lane < DK / 4) {
      uint32_t w[4];
      const Shared to = scratch + kPairBytes * lane;
      W::LoadTable(tables + Tables::kBack + Tables::kBackBytes * lane, w);
      W::Store64(to, w[0], w[1]);
      W::Store64(to + 8, w[2], w[3]);
      W::LoadTable(tables + Tables::kBack + Tables::kBackBytes * lane + 16, w);
      W::Store64(to + kHalvesAt, w[0], w[1]);
      W::Store64(to + kHalvesAt + 16, w[0], w[1]);
    }
  }
  KVTIDE_DEVICE void BeginPage(int number) { page = number; }

  // RoPE of the first token of each half of the page.
  KVTIDE_DEVICE void TurnPage() {
    const int lane = W::Lane();
    const uint64_t first = static_cast<uint64_t>(position + int64_t{page} * kBlockTokens);
    if (lane < DK / 4) {
      uint32_t w[4];
      W::LoadTable(tables + Tables::kPhases + 16 * lane, w);
      uint32_t phase[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const uint64_t per_position = static_cast<uint64_t>(w[2 * e + 1]) << 32 | w[2 * e];
        phase[e] = static_cast<uint32_t>((per_position * first) >> 32);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float angle[2];
#pragma unroll
        for (int e = 0; e < 2; e++)
          angle[e] =
              W::ToFloat(static_cast<int>(phase[e] + static_cast<uint32_t>(32 * half) * w[2 * e + 1])) *
              kRadians;
        W::Store64(scratch + kPairBytes * lane + kHalvesAt + 16 * half + 8,
                   W::template Pack<false>(W::Cos(angle[0]), W::Cos(angle[1])),
                   W::template Pack<false>(W::Sin(angle[0]), W::Sin(angle[1])));
      }
    }
    W::Sync();
  }

  // A fragments of the tokens of `half`, for step `step` of four groups: tokens 4n + i and 4n + 2 + i.
  template <int kWidth>
  KVTIDE_DEVICE void LoadLevels(Shared k_half, uint32_t slot, int half, uint32_t (*a)[4]) const {
    const int lane = W::Lane(), n = lane >> 2;
    const auto place = static_cast<uint32_t>(16 * (n & 1) + 4 * (n >> 1));
    const auto group =
        levels.template GroupOf<kWidth>(k_half + static_cast<int>((slot & 0xffffu) ^ place), slot >> 16);
    levels.template Decode<kWidth>(
        group, half, [](uint32_t x) { return ~x; },
        [a](int j, uint32_t b0, uint32_t b1) {
          a[j / 2][j % 2] = b0;
          a[j / 2][2 + j % 2] = b1;
        });
  }

  // Keys of the halves from `first` on, whose levels are in `a` (kUsed steps have bits), times queries.
  template <int kUsed>
  KVTIDE_DEVICE void Multiply(const uint32_t (&a)[Tables::kGroupSteps][2 * kHalves][4], int first,
                              const uint32_t (&gains)[2 * kHalves][2],
                              float (&logits)[MT][2 * kHalves][4]) const {
    const int lane = W::Lane();
    const std::byte* step = tables + 16 * lane;
    Shared of_pairs = scratch + kPairBytes * (lane & 3), queries = this->query + 8 * lane;
    int start[4];
    {
      uint32_t w[4];
      W::Load128(levels.lookup + Levels::kBytes, w);
#pragma unroll
      for (int i = 0; i < 4; i++) start[i] = static_cast<int>(w[i]);
    }
#pragma unroll 2
    for (int s = 0; s < Tables::kSteps; s++) {
      int sums[2 * kHalves][2][4];
#pragma unroll
      for (int k = 0; k < kUsed; k++) {
        uint32_t b[4];
        W::LoadTable(step + Tables::kInverse + k * 512, b);
#pragma unroll
        for (int u = 0; u < 2 * kHalves; u++)
#pragma unroll
          for (int i = 0; i < 2; i++)
            W::template MmaBytes<true>(sums[u][i], a[k][u], b[2 * i], b[2 * i + 1],
                                       k == 0 ? start : sums[u][i]);
      }
      uint32_t turned[kHalves][MT][2], back[4], own[4];  // own: means, cosines and sines
      W::Load128(of_pairs, back);
#pragma unroll
      for (int half = 0; half < kHalves; half++) {
        W::Load128(of_pairs + kHalvesAt + 16 * (first + half), own);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          uint32_t q[2];
          W::Load64(queries + m * (Tables::kSteps * Tables::kQueryStepBytes), q);
          turned[half][m][0] = W::HalfFma(q[1], own[3], W::HalfMul(q[0], own[2]));
          turned[half][m][1] = W::HalfFma(W::HalfNegative(q[0]), own[3], W::HalfMul(q[1], own[2]));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t rope[4];
        W::LoadTable(step + Tables::kRope + i * 512, rope);
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
          const int u = 2 * half + i;
          uint32_t key[4];
#pragma unroll
          for (int row = 0; row < 2; row++) {
            uint32_t x[2];
#pragma unroll
            for (int second = 0; second < 2; second++) {
              const auto value = [&](int e) {
                return W::Float(static_cast<uint32_t>(sums[u][second][2 * row + e])) +
                       W::Float(back[2 * second + e]);
              };
              x[second] = W::HalfFma(W::template Pack<false>(value(0), value(1)), gains[u][row], own[second]);
            }
            const uint32_t cosine = rope[2 * row], sine = rope[2 * row + 1];
            key[row] = W::HalfFma(W::HalfNegative(x[1]), sine, W::HalfMul(x[0], cosine));
            key[2 + row] = W::HalfFma(x[0], sine, W::HalfMul(x[1], cosine));
          }
#pragma unroll
          for (int m = 0; m < MT; m++)
            W::template MmaHalf<false>(logits[m][u], key, turned[half][m][0], turned[half][m][1]);
        }
      }
      step += Tables::kStepBytes;
      of_pairs += 4 * kPairBytes;
      queries += Tables::kQueryStepBytes;
    }
  }

  KVTIDE_DEVICE void KeyStage(Shared k_half, int /*tile*/, float (&y)[MT][kLogits]) {
    const int lane = W::Lane(), n = lane >> 2, c = lane & 3;
    TurnPage();
    uint32_t slots[4];
    W::LoadTable(tables + Tables::kSlots + 16 * c, slots);
    const uint32_t widths = W::LoadTableWord(tables + Tables::kWidths);
#pragma unroll 1
    for (int first = 0; first < 2; first += kHalves) {
      uint32_t a[Tables::kGroupSteps][2 * kHalves][4];
#pragma unroll
      for (int step = 0; step < Tables::kGroupSteps; step++) {
        const uint32_t width = widths >> (8 * step) & 255u;
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
          uint32_t(*const to)[4] = a[step] + 2 * half;
          if (width > 4)
            LoadLevels<kMostTideWidth>(k_half, slots[step], first + half, to);
          else if (width == 4)
            LoadLevels<4>(k_half, slots[step], first + half, to);
          else if (width == 3)
            LoadLevels<3>(k_half, slots[step], first + half, to);
          else if (width == 2)
            LoadLevels<2>(k_half, slots[step], first + half, to);
          else if (width == 1)
            LoadLevels<1>(k_half, slots[step], first + half, to);
        }
      }
      uint32_t gains[2 * kHalves][2];
#pragma unroll
      for (int half = 0; half < kHalves; half++) {
        const uint32_t bytes = W::Load32(k_half + kKCodeBytes + (first + half) * 32 + 4 * n);
#pragma unroll
        for (int t = 0; t < 4; t++) {
          // A float of 2^23 and the byte, then the byte - 1 of 16 steps to twice the gain.
          const float byte = W::Float(W::Prmt(bytes, 0x4b000000u, static_cast<uint32_t>(0x7440 + t)));
          const float gain = W::Ex2(W::Fma(byte, 0.0625f, -524288.0625f));
          gains[2 * half + t % 2][t / 2] = W::template Pack<false>(gain, gain);
        }
      }
      float logits[MT][2 * kHalves][4];
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int u = 0; u < 2 * kHalves; u++)
          logits[m][u][0] = logits[m][u][1] = logits[m][u][2] = logits[m][u][3] = 0;
      if constexpr (Tables::kGroupSteps == 2) {
        if (widths >> 8 != 0)
          Multiply<2>(a, first, gains, logits);
        else
          Multiply<1>(a, first, gains, logits);
      } else {
        if (widths >> 24 != 0)
          Multiply<4>(a, first, gains, logits);
        else if (widths >> 16 != 0)
          Multiply<3>(a, first, gains, logits);
        else if (widths >> 8 != 0)
          Multiply<2>(a, first, gains, logits);
        else
          Multiply<1>(a, first, gains, logits);
      }
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < kHalves; half++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const uint32_t four[4] = {W::Bits(logits[m][2 * half][e]), W::Bits(logits[m][2 * half + 1][e]),
                                      W::Bits(logits[m][2 * half][2 + e]),
                                      W::Bits(logits[m][2 * half + 1][2 + e])};
            W::Store128(scratch + kLogitsAt + (8 * m + 2 * c + e) * kRowBytes + (first + half) * 128 + 16 * n,
                        four);
          }
    }
    W::Sync();
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          uint32_t w[4];
          W::Load128(scratch + kLogitsAt + (8 * m + n) * kRowBytes + half * 128 + 32 * c + 16 * i, w);
#pragma unroll
          for (int e = 0; e < 4; e++) y[m][8 * half + 4 * i + e] = W::Float(w[e]);
        }
  }
};

}  // namespace kvtide::cuda
