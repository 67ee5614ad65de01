// Attention of one warp over f16 or bf16 pages, with m16n8k16 products. The interface is CodedTile's; a page
// is walked in tiles of kTokens tokens so that a stage of the ring stays small.
//
// Queries and weights are split in a rounded half and the rest, on the two halves of the 16 rows, like the
// bytes of coded pages: attention is then as exact as the stored values. Pages are row-major with swizzled
// 16-byte chunks (HalfPrecisionIndex), which both ldmatrix forms read without bank conflicts.
#pragma once

#include "kernels/cuda/attend/coded_tile.h"

namespace kvtide::cuda {

template <class W, bool kBf16, int DK, int DV, int MT, int kTileTokens>
struct HalfTile {
  using Shared = typename W::Shared;
  static constexpr int kTokens = kTileTokens, kTilesPerPage = kBlockTokens / kTokens, kLogits = kTokens / 4;
  static constexpr int kRows = 8 * MT;
  static constexpr int kTokenGroups = kTokens / 8, kKSteps = DK / 16;
  static constexpr int kKBytes = kTokens * DK * 2, kVBytes = kTokens * DV * 2;
  static constexpr int kKPieceOffset(int tile) { return tile * kKBytes; }
  static constexpr int kVPieceOffset(int tile) { return kBlockTokens * DK * 2 + tile * kVBytes; }
  static constexpr float kKUnit = 1, kVUnit = 1;
  static constexpr int kQueryFragmentBytes = MT * kKSteps * 512, kQueryBytes = kQueryFragmentBytes;
  static_assert(kTokens % 16 == 0 && DK % 32 == 0 && DV % 32 == 0);

  RowSums<DV, MT> rows;
  Shared query;

  static KVTIDE_DEVICE int TokenOf(int t, int c) { return t / 2 * 8 + 2 * c + t % 2; }
  static constexpr int kTableBytes = 0;
  static KVTIDE_DEVICE void WriteTables(Shared) {}
  KVTIDE_DEVICE void Init(Shared) {}
  KVTIDE_DEVICE void LoadQuery(Shared query_area) { query = query_area; }

  // The lane-dependent part of a swizzle: rows of a fragment are 8 consecutive tokens.
  template <int D>
  static KVTIDE_DEVICE int Swizzle(int row) {
    return D % 64 == 0 ? row : row >> 1;
  }

  KVTIDE_DEVICE void KeyStage(Shared k_half, int /*tile*/, float (&y)[MT][kLogits]) {
    const int lane = W::Lane(), row = lane & 7, matrix = lane >> 3, swizzle = Swizzle<DK>(row);
    float acc[MT][kTokenGroups][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < kTokenGroups; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0;
#pragma unroll
    for (int s = 0; s < kKSteps; s += 2) {  // 32 dims: four chunks
      const Shared rows_at = k_half + row * DK * 2 + (((2 * s + matrix) ^ swizzle) * 16);
      uint32_t a[MT][2][4];
#pragma unroll
      for (int m = 0; m < MT; m++) {
        W::Load128(query + (m * kKSteps + s) * 512 + lane * 16, a[m][0]);
        W::Load128(query + (m * kKSteps + s + 1) * 512 + lane * 16, a[m][1]);
      }
#pragma unroll
      for (int i = 0; i < kTokenGroups; i++) {
        uint32_t b[4];
        W::LoadMatrix(rows_at + i * 8 * DK * 2, b);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          W::template MmaHalf<kBf16>(acc[m][i], a[m][0], b[0], b[1]);
          W::template MmaHalf<kBf16>(acc[m][i], a[m][1], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < kTokenGroups; i++) {
        y[m][2 * i] = acc[m][i][0] + acc[m][i][2];
        y[m][2 * i + 1] = acc[m][i][1] + acc[m][i][3];
      }
  }

  template <class Adjust>
  KVTIDE_DEVICE void ValueStage(Shared v_half, int /*tile*/, float (&y)[MT][kLogits],
                                const float (&key_multiplier)[MT], bool special, Adjust adjust) {
    float multiplier[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) multiplier[m] = key_multiplier[m];
    if (special) adjust(y, multiplier);
    float page_reference[MT], gain[MT];
    bool seen[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      float top = y[m][0];
#pragma unroll
      for (int t = 1; t < kLogits; t++) top = W::Max(top, y[m][t]);
      top = W::Max(top, W::ShflXor(top, 1));
      top = W::Max(top, W::ShflXor(top, 2));
      seen[m] = top > 0.5f * kMasked;
      page_reference[m] = (seen[m] ? top : 0.0f) * multiplier[m];
    }
    rows.template Raise<W>(page_reference, seen);
    uint32_t weights[MT][kTokens / 16][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      float page_sum = 0;
#pragma unroll
      for (int t = 0; t < kLogits; t++) {
        y[m][t] = W::Ex2(W::Fma(y[m][t], multiplier[m], -page_reference[m]));
        page_sum += y[m][t];
      }
      gain[m] = seen[m] ? W::Ex2(page_reference[m] - rows.reference[m]) : 0.0f;
      if (!seen[m]) page_sum = 0;
      rows.sum[m] = W::Fma(page_sum, gain[m], rows.sum[m]);
#pragma unroll
      for (int i = 0; i < kTokenGroups; i++) {
        const uint32_t rounded = W::template Pack<kBf16>(y[m][2 * i], y[m][2 * i + 1]);
        float low, high;
        W::template Unpack<kBf16>(rounded, low, high);
        weights[m][i / 2][2 * (i % 2)] = rounded;
        weights[m][i / 2][2 * (i % 2) + 1] =
            W::template Pack<kBf16>(y[m][2 * i] - low, y[m][2 * i + 1] - high);
      }
    }

    const int lane = W::Lane(), row = lane & 7, matrix = lane >> 3, swizzle = Swizzle<DV>(row);
#pragma unroll
    for (int j = 0; j < DV / 8; j += 2) {  // 16 dims: two chunks of 8 tokens, and of the next 8 tokens
      const Shared rows_at =
          v_half + ((matrix & 1) * 8 + row) * DV * 2 + (((j + (matrix >> 1)) ^ swizzle) * 16);
      float acc[MT][2][4];
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) acc[m][h][0] = acc[m][h][1] = acc[m][h][2] = acc[m][h][3] = 0;
#pragma unroll
      for (int u = 0; u < kTokens / 16; u++) {
        uint32_t b[4];
        W::LoadMatrixTransposed(rows_at + u * 16 * DV * 2, b);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          W::template MmaHalf<kBf16>(acc[m][0], weights[m][u], b[0], b[1]);
          W::template MmaHalf<kBf16>(acc[m][1], weights[m][u], b[2], b[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& o = rows.output[m][j + h][e];
            o = W::Fma(acc[m][h][e] + acc[m][h][2 + e], gain[m], o);
          }
    }
  }
};

}  // namespace kvtide::cuda
