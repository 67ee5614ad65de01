// One warp prepares one query row for a unit: turns it into the frame of the unit's keys (q / gain, then the
// rotation of the K type), rounds it to two parts of 8 bits or two halves, and writes it to shared memory as
// A fragments in the order in which the lanes load them. Also the Walsh-Hadamard rotation of a row spread
// over a warp, used for outputs too.
//
// A lane holds dims 128b + 4*lane .. +3 of a row as x[b][0..3]; dims at or above D are 0.
#pragma once

#include "kernels/cuda/device/warp.h"
#include "kernels/format/turbo.h"
#include "kernels/format/uniform.h"

namespace kvtide::cuda {

template <int D>
struct WarpRow {
  static constexpr int kBlocks = (D + 127) / 128;
  float x[kBlocks][4];
};

// The signs of a lane's four dims in the low bits. Selects, because a register array has no run-time index.
KVTIDE_DEVICE uint32_t LaneSigns(int side, int lane) {
  const int word = lane / 8;
  const uint32_t low = word & 1 ? Hadamard::Sign(side, 1) : Hadamard::Sign(side, 0);
  const uint32_t high = word & 1 ? Hadamard::Sign(side, 3) : Hadamard::Sign(side, 2);
  return (word & 2 ? high : low) >> (4 * (lane % 8));
}

// Hadamard::Forward and ::Inverse (format/turbo.h) on a row spread over a warp.
template <class W, int D, bool kInverse>
KVTIDE_DEVICE void RotateHadamard(WarpRow<D>& row) {
  const int lane = W::Lane();
#pragma unroll
  for (int b = 0; b < WarpRow<D>::kBlocks; b++) {
    constexpr int kRest = D % 128;
    const int n = 128 * (b + 1) <= D ? 128 : kRest;
    const int run = n == 96 ? 32 : n;  // length of one transform
    float(&x)[4] = row.x[b];
    const uint32_t first = LaneSigns(kInverse ? 1 : 0, lane), second = LaneSigns(kInverse ? 0 : 1, lane);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (first >> i & 1u) x[i] = -x[i];
    const float a = x[0] + x[1], c = x[0] - x[1], e = x[2] + x[3], f = x[2] - x[3];
    x[0] = a + e;
    x[1] = c + f;
    x[2] = a - e;
    x[3] = c - f;
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      if (4 * mask >= run) break;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float other = W::ShflXor(x[i], mask);
        x[i] = lane & mask ? other - x[i] : x[i] + other;
      }
    }
    const float factor = run == 128 ? 0.08838834764831845f : run == 64 ? 0.125f : 0.17677669529663687f;
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] *= factor;
    if (n == 96) {  // the reflection across the three runs, which lie in lanes 0-7, 8-15 and 16-23
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float sum = lane < 24 ? x[i] : 0.0f;
        sum += W::ShflXor(sum, 8);
        sum += W::ShflXor(sum, 16);
        x[i] -= sum * (2.0f / 3.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (second >> i & 1u) x[i] = -x[i];
      if (4 * lane + i >= n) x[i] = 0;
    }
  }
}

template <class W, int D>
KVTIDE_DEVICE float LargestMagnitude(const WarpRow<D>& row) {
  float top = 0;
#pragma unroll
  for (int b = 0; b < WarpRow<D>::kBlocks; b++)
#pragma unroll
    for (int i = 0; i < 4; i++) top = W::Max(top, row.x[b][i] < 0 ? -row.x[b][i] : row.x[b][i]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) top = W::Max(top, W::ShflXor(top, mask));
  return top;
}

// Where a lane's 4 dims of block b go: the first of two words of row `r`; high parts at +0, rests at +4
// bytes.
template <int D, int kStepDims>
KVTIDE_DEVICE int FragmentOffset(int lane, int b, int r) {
  constexpr int kLanesPerStep = kStepDims / 4;
  const int step = 128 / kStepDims * b + lane / kLanesPerStep;
  const int m = r / 8, n = r % 8;
  if constexpr (kStepDims == 32) {  // bytes: 4 dims make one word; lane c has dims 8c .. 8c+7
    const int c = lane % 8 / 2;
    return (m * (D / 32) + step) * 512 + (4 * n + c) * 16 + (lane & 1) * 8;
  } else {  // halves: dims 2p, 2p+1 of a step make pair p; lane c has pairs c and c + 4
    const int pair = lane % 4 * 2;
    return (m * (D / 16) + step) * 512 + (4 * n + pair % 4) * 16 + pair / 4 * 8;
  }
}

// How a row is divided into numbers of `most` at most: by its largest magnitude, and by -1 where logits are
// taken times a negative scale, as what they are taken times beside the row has to be positive.
struct RowDivision {
  float inverse;  // what values are taken times; 0 for a row of zeros
  float unit;     // what 1 of a logit of such numbers is worth, times |scale|
};
// Rows so small that their inverse would leave f32 are made larger first: what vanishes is decided by the
// logits, not by the queries alone.
template <class W, int D>
KVTIDE_DEVICE RowDivision Divide(WarpRow<D>& row, float most, float scale) {
  float top = LargestMagnitude<W, D>(row), size = scale < 0 ? -scale : scale;
  if (top < 0x1p-64f) {
#pragma unroll
    for (int b = 0; b < WarpRow<D>::kBlocks; b++)
#pragma unroll
      for (int i = 0; i < 4; i++) row.x[b][i] *= 0x1p64f;
    top *= 0x1p64f;
    size *= 0x1p-64f;
  }
  const float inverse = top > 0 ? most / top : 0.0f;
  // Never 0, so that masked logits stay below all others.
  return {scale < 0 ? -inverse : inverse, W::Max(top / most * size, 1e-25f)};
}

// Coded pages: q16 = round(q * 32639 / max) in balanced bytes. Returns what one unit of the integer sum is
// worth, times |scale|; the sign of the scale is the row's. kGroup: values per K scale; kOffset: table offset
// to take back (0 = none); kInterleaved: of 8 dims those with even numbers come first (QuadDecoder).
template <class W, int D, int kGroup, int kOffset, bool kInterleaved>
KVTIDE_DEVICE float WriteCodedQuery(WarpRow<D>& row, float scale, int r, typename W::Shared area,
                                    int fragment_bytes) {
  constexpr int kGroups = (D + kGroup - 1) / kGroup;
  const int lane = W::Lane();
  // 32639 = 127 * 257: the largest value whose high byte, rounded to balance the low one, is still 127.
  const auto [inverse, unit] = Divide<W, D>(row, 32639.0f, scale);
#pragma unroll
  for (int b = 0; b < WarpRow<D>::kBlocks; b++) {
    uint32_t high_word = 0, low_word = 0;
    int high_sum = 0, low_sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int q = W::Round(row.x[b][i] * inverse);
      const int high = (q + 128) >> 8, low = q - high * 256;
      high_word |= static_cast<uint32_t>(high & 255) << (8 * i);
      low_word |= static_cast<uint32_t>(low & 255) << (8 * i);
      high_sum += high;
      low_sum += low;
    }
    if constexpr (kInterleaved) {  // two lanes have the 8 dims
      const uint32_t other_high = W::ShflXor(high_word, 1), other_low = W::ShflXor(low_word, 1);
      const bool odd = lane % 2 == 1;
      high_word = odd ? W::Prmt(other_high, high_word, 0x7531u) : W::Prmt(high_word, other_high, 0x6420u);
      low_word = odd ? W::Prmt(other_low, low_word, 0x7531u) : W::Prmt(low_word, other_low, 0x6420u);
    }
    if (128 * b + 4 * lane < D) W::Store64(area + FragmentOffset<D, 32>(lane, b, r), high_word, low_word);
    if constexpr (kOffset != 0) {
      constexpr int kSpan = kGroup / 4;  // lanes that share a group
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) {
        if (mask >= kSpan) break;
        high_sum += W::ShflXor(high_sum, mask);
        low_sum += W::ShflXor(low_sum, mask);
      }
      const int group = (128 * b + 4 * lane) / kGroup;
      if (lane % kSpan == 0 && group < kGroups)
        W::Store64(area + fragment_bytes + (r * kGroups + group) * 8,
                   static_cast<uint32_t>(-kOffset * high_sum), static_cast<uint32_t>(-kOffset * low_sum));
    }
  }
  return unit;
}

// f16 or bf16 pages: q / max in two halves. Returns max times |scale|; the sign of the scale is the row's.
template <class W, int D, bool kBf16>
KVTIDE_DEVICE float WriteHalfQuery(WarpRow<D>& row, float scale, int r, typename W::Shared area) {
  const int lane = W::Lane();
  const auto [inverse, unit] = Divide<W, D>(row, 1.0f, scale);
#pragma unroll
  for (int b = 0; b < WarpRow<D>::kBlocks; b++) {
    if (128 * b + 4 * lane >= D) continue;
    const int offset = FragmentOffset<D, 16>(lane, b, r);
#pragma unroll
    for (int p = 0; p < 2; p++) {
      const float x = row.x[b][2 * p] * inverse, y = row.x[b][2 * p + 1] * inverse;
      const uint32_t rounded = W::template Pack<kBf16>(x, y);
      float low, high;
      W::template Unpack<kBf16>(rounded, low, high);
      W::Store64(area + offset + p * 16, rounded, W::template Pack<kBf16>(x - low, y - high));
    }
  }
  return unit;
}

}  // namespace kvtide::cuda
