// Attention of one warp over tiles of 64 or 128 tokens of f16 keys and values, for many query rows: 16 or 32
// rows a warp, products of m16n8k16 with f32 sums, softmax online. Runs on a GPU and in an emulated warp
// (warp.h).
//
// Tiles, and the queries beside them, lie in sub-tiles of 64 dims: rows of 128 bytes, their 16-byte chunks
// XORed with the row (f16_tile.h), which ldmatrix reads without bank conflicts in either direction. Weights
// are rounded to f16: they are taken relative to a power of two below the largest, so that they reach from
// 2^15 down and small ones keep their digits; the reference is raised only when a logit outgrows it by
// kSlack, which spares most of the rescaling.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/codec/f16_tile.h"
#include "kernels/cuda/device/warp.h"
#include "kernels/format/page_order.h"

namespace kvtide::cuda {

// What a row of a unit may see, in tokens of the unit: [begin, end).
struct RowLimits {
  int32_t begin = 0, end = 0;
};

template <class W, int D, int MT, int kQueryRows, int kTokensT = kBlockTokens>
struct PrefillTile {
  using Shared = typename W::Shared;
  static constexpr int kTokens = kTokensT;
  static constexpr int kRows = 16 * MT;        // of the warp
  static constexpr int kRowsTogether = kRows;  // that one product takes
  static constexpr int kTileBytes = kTokens * D * 2;
  static constexpr int kGroups = kTokens / 8;
  static constexpr float kLow = -1e30f, kShift = 10, kSlack = 5;
  static_assert(D % 64 == 0);

  float output[MT][D / 8][4];
  float reference[MT][2], sum[MT][2];  // of rows n and n + 8 of each 16
  int offsets[4];                      // of the lane's row in a 16 x 16 corner of a tile, by pair of chunks

  KVTIDE_DEVICE void Reset() {
    const int lane = W::Lane(), row = lane & 7, matrix = lane >> 3;
#pragma unroll
    for (int s = 0; s < 4; s++)
      offsets[s] = (row + 8 * (matrix & 1)) * 128 + (((2 * s + (matrix >> 1)) ^ row) * 16);
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
      for (int j = 0; j < D / 8; j++)
        output[m][j][0] = output[m][j][1] = output[m][j][2] = output[m][j][3] = 0;
      reference[m][0] = reference[m][1] = kLow;
      sum[m][0] = sum[m][1] = 0;
    }
  }

  // logits[m][i][2h + e]: row 16m + n + 8h, token 8i + 2c + e. `query` is the warp's first row.
  KVTIDE_DEVICE void KeyStage(Shared query, Shared keys, float (&logits)[MT][kGroups][4]) const {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < kGroups; i++)
        logits[m][i][0] = logits[m][i][1] = logits[m][i][2] = logits[m][i][3] = 0;
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
      const int offset = offsets[s % 4];
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; m++)
        W::LoadMatrix(query + (s / 4 * kQueryRows * 128 + m * 16 * 128) + offset, a[m]);
#pragma unroll
      for (int i = 0; i < kGroups; i += 2) {
        uint32_t b[4];
        W::LoadMatrix(keys + (s / 4 * kTokens * 128 + i * 8 * 128) + offset, b);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          W::template MmaHalf<false>(logits[m][i], a[m], b[0], b[2]);
          W::template MmaHalf<false>(logits[m][i + 1], a[m], b[1], b[3]);
        }
      }
    }
  }

  // logit = cap * tanh(logit / cap), with tanh(x) = 1 - 2 / (e^2x + 1); afterwards in units of the multiplier
  // again.
  static KVTIDE_DEVICE void Cap(float cap, const float (&multiplier)[MT][2],
                                float (&logits)[MT][kGroups][4]) {
    constexpr float kTwoLog2E = 2.885390082f;
    const float inverse_cap = W::FastRcp(cap);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float in = multiplier[m][h] * inverse_cap * kTwoLog2E, out = cap * W::FastRcp(multiplier[m][h]);
#pragma unroll
        for (int i = 0; i < kGroups; i++)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; e++)
            logits[m][i][e] = W::Fma(-2.0f * out, W::FastRcp(W::Ex2(logits[m][i][e] * in) + 1.0f), out);
      }
  }

  // Takes out what rows may not see; `first` is the tile's first token.
  static KVTIDE_DEVICE void Mask(int first, const RowLimits (&limits)[MT][2],
                                 float (&logits)[MT][kGroups][4]) {
    const int c = W::Lane() & 3;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < kGroups; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int token = first + 8 * i + 2 * c + e % 2;
          const RowLimits& limit = limits[m][e / 2];
          if (token < limit.begin || token >= limit.end) logits[m][i][e] = -INFINITY;
        }
  }

  // Logits times multiplier (above 0) are exponents of 2. Raises the references that a logit outgrows, the
  // sums of weights with them, and says whether it did for any row of the warp; the output of before is then
  // to be multiplied by `factors`.
  KVTIDE_DEVICE bool Raise(const float (&logits)[MT][kGroups][4], const float (&multiplier)[MT][2],
                           float (&factors)[MT][2]) {
    float top[MT][2];
    bool higher = false;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float x = W::Max(logits[m][0][2 * h], logits[m][0][2 * h + 1]);
#pragma unroll
        for (int i = 1; i < kGroups; i++) x = W::Max(x, W::Max(logits[m][i][2 * h], logits[m][i][2 * h + 1]));
        x = W::Max(x, W::ShflXor(x, 1));
        x = W::Max(x, W::ShflXor(x, 2));
        top[m][h] = x * multiplier[m][h];
        higher |= top[m][h] > reference[m][h] + kSlack;
        factors[m][h] = 1;
      }
    if (W::All(!higher)) return false;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float next = W::Max(reference[m][h], top[m][h]);
        factors[m][h] = W::Ex2(reference[m][h] - next);
        reference[m][h] = next;
        sum[m][h] *= factors[m][h];
      }
    return true;
  }
  KVTIDE_DEVICE void Rescale(const float (&factors)[MT][2]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
          output[m][j][2 * h] *= factors[m][h];
          output[m][j][2 * h + 1] *= factors[m][h];
        }
  }
  // Logits become weights, and are counted.
  KVTIDE_DEVICE void Exponentials(float (&logits)[MT][kGroups][4], const float (&multiplier)[MT][2]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float bias = kShift - reference[m][h];
#pragma unroll
        for (int i = 0; i < kGroups; i++) {
          float &low = logits[m][i][2 * h], &high = logits[m][i][2 * h + 1];
          low = W::Ex2(W::Fma(low, multiplier[m][h], bias));
          high = W::Ex2(W::Fma(high, multiplier[m][h], bias));
          sum[m][h] += low + high;
        }
      }
  }
  // As fragments for ValueStage.
  static KVTIDE_DEVICE void Pack(const float (&weights)[MT][kGroups][4],
                                 uint32_t (&fragments)[MT][kGroups / 2][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < kGroups; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          fragments[m][i / 2][2 * (i % 2) + h] =
              W::template Pack<false>(weights[m][i][2 * h], weights[m][i][2 * h + 1]);
  }
  KVTIDE_DEVICE void Weigh(float (&logits)[MT][kGroups][4], const float (&multiplier)[MT][2],
                           uint32_t (&weights)[MT][kGroups / 2][4]) {
    float factors[MT][2];
    if (Raise(logits, multiplier, factors)) Rescale(factors);
    Exponentials(logits, multiplier);
    Pack(logits, weights);
  }

  KVTIDE_DEVICE void ValueStage(Shared values, const uint32_t (&weights)[MT][kGroups / 2][4]) {
#pragma unroll
    for (int u = 0; u < kGroups / 2; u++)
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        uint32_t b[4];
        W::LoadMatrixTransposed(values + (j / 8 * kTokens * 128 + u * 16 * 128) + offsets[j / 2 % 4], b);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          W::template MmaHalf<false>(output[m][j], weights[m][u], b[0], b[1]);
          W::template MmaHalf<false>(output[m][j + 1], weights[m][u], b[2], b[3]);
        }
      }
  }

  // Sums over the lanes of a row; afterwards each holds the whole.
  KVTIDE_DEVICE void Finish() {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        sum[m][h] += W::ShflXor(sum[m][h], 1);
        sum[m][h] += W::ShflXor(sum[m][h], 2);
      }
  }
  // The exponent that sum and output are relative to.
  KVTIDE_DEVICE float Reference(int m, int h) const { return reference[m][h] - kShift; }
};

}  // namespace kvtide::cuda
