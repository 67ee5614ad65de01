// Cache types tide4 to tide1: keys as transform coefficients with the bits where the queries look.
// They code keys only, and only with a calibrated profile (profile.h). RoPE is taken back (rope.h), so that a
// key depends on its token and no longer on its place; a head's transform turns it minus its mean into
// uncorrelated coefficients of variance 1, sorted by how much they move the logits of the model's queries,
// and its widths say with how many bits, 0 to 6, each group of 8 neighbouring coefficients is coded. After
// the Karhunen-Loeve transform with a query metric (tide_maker.h). Whoever reads such a key rebuilds it:
// levels, inverse transform, mean, RoPE of its position.
//
// A stored coefficient is  gain * TideLevel(width, code) / TideSigma(width), with one gain for the whole
// vector: 1 where all coefficients lie inside their quantisers, more for outlier tokens, which would
// otherwise clip.
//
// Half a page is a code plane of TideUnits units of 64 bytes, then u8[64] gains (TideGain); together as many
// bytes as turbo of the same bits at one f16 scale a token, and for tide1, which has no such turbo, one bit a
// value with the gain. A group of width w takes w units, one bit plane each: bit e of byte TideByte(token, group) of unit b is bit b of the code of coefficient 8 * group + e.
// Groups follow each other without gaps; what they do not fill is zero. The bytes of a unit stand in the
// order of an 8-bit key plane (page_order.h): its 16-byte slots hold two tokens, and 8 bytes of a bit plane
// become 64 bytes of that plane.
#pragma once

#include <cstdint>

#include "kernels/format/codec.h"
#include "kernels/format/page_order.h"

namespace kvtide {

constexpr int kTideTypes = 4;       // in the order of HeadProfile::widths
constexpr int kLeastTideTypes = 3;  // of profiles that were made before there was tide1
constexpr const char* kTideNames[kTideTypes] = {"tide4", "tide3", "tide2", "tide1"};
constexpr int kTideBits[kTideTypes] = {4, 3, 2, 1};
constexpr int kTideVersion = 2;   // raised with every change of what stored bytes mean
constexpr int kMaxTideDim = 512;  // one scale for any vector
constexpr int kTideGroup = 8, kMostTideWidth = 6;
constexpr int kTideUnitBytes = 64;

constexpr int kTideGainBytes = 64;

// Units of 64 bytes, and so the most that the widths of a head may add up to: what the gains leave of the
// scales of turbo is one unit more. The gains of tide1 take the place of one.
KVTIDE_HD constexpr int TideUnits(int bits, int stored_dim) {
  return bits == 1 ? stored_dim / kTideGroup - 1
                   : static_cast<int>(CodePlaneBytes(bits, stored_dim)) / kTideUnitBytes + 1;
}

// Place of a token's byte in every unit of a group.
KVTIDE_HD constexpr int TideByte(int token, int group) {
  const int t = token % 32, n = 2 * (t / 8) + (t & 1), i = t % 8 / 2, c = group % 4;
  return token / 32 * 32 + i / 2 * 16 + 2 * (n ^ (2 * c)) + i % 2;
}

// The level of one standard deviation.
KVTIDE_HD constexpr float TideSigma(int width) {
  const float sigma[kMostTideWidth + 1] = {1.0f, 139.118f, 79.46f, 52.941f, 38.141f, 36.396f, 28.895f};
  return sigma[width];
}

// Lloyd-Max levels for N(0,1) as integers of 7 bits and a sign, ascending; the error is that of the real
// levels at 1 to 4 bits, 0.7 and 2.8 % more at 5 and 6. Width 0 has the level 0.
KVTIDE_HD constexpr int TidePositive(int width, int i) {
  const uint8_t levels[64] = {0,                                                                    //
                              111,                                                                  //
                              36,  120,                                                             //
                              13,  40,  71, 114,                                                    //
                              5,   15,  25, 36,  48, 62, 79, 104,                                   //
                              2,   7,   12, 17,  22, 27, 32, 38,  44, 50, 57, 65, 74, 84, 98, 119,  //
                              1,   3,   5,  7,   9,  11, 13, 15,  17, 19, 21, 23, 25, 27, 29, 32,   //
                              34,  37,  39, 42,  45, 48, 51, 54,  58, 62, 66, 71, 77, 84, 93, 108};
  return width == 0 ? 0 : levels[(1 << (width - 1)) + i];
}
KVTIDE_HD constexpr int TideLevel(int width, int code) {
  if (width == 0) return 0;
  const int half = 1 << (width - 1);
  return code >= half ? TidePositive(width, code - half) : -TidePositive(width, half - 1 - code);
}

// The code of a value given in levels; a value on a midpoint takes the code nearer to 0, and 0 that of the
// negative side.
KVTIDE_HD inline int TideCode(int width, float v) {
  const int half = 1 << (width - 1);
  const float magnitude = v < 0 ? -v : v;
  int low = 0, high = half - 1;  // the level is among these
  while (low < high) {
    const int middle = (low + high) / 2;
    const float midpoint =
        0.5f * static_cast<float>(TidePositive(width, middle) + TidePositive(width, middle + 1));
    if (magnitude > midpoint) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return v > 0 ? half + low : half - 1 - low;
}

// The end of a quantiser in standard deviations: half a step beyond its last level. Values up to there are as
// well coded as others (README.md says what other ends cost). 0 for widths below 2, whose coefficients do not
// ask for a gain.
KVTIDE_HD constexpr float TideEnd(int width) {
  if (width < 2) return 0;
  const int last = (1 << (width - 1)) - 1;
  return 0.5f * static_cast<float>(3 * TidePositive(width, last) - TidePositive(width, last - 1)) /
         TideSigma(width);
}

// A gain from its byte: 0 where there is no token, else 2^((byte - 1) / 16).
KVTIDE_HD inline float TideGain(int byte) {
  const float steps[16] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                           1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                           1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  if (byte == 0) return 0;
  return Mul(steps[(byte - 1) % 16], static_cast<float>(1 << (byte - 1) / 16));
}

// The byte of a vector's gain, from its `dim` coefficients: the least with which none lies beyond the end.
KVTIDE_HD inline uint8_t TideGainByte(const float* z, const uint8_t* widths, int dim) {
  float wanted = 1;
  for (int g = 0; g < dim / kTideGroup; g++) {
    const float end = TideEnd(widths[g]);
    if (end == 0) continue;
    float largest = 0;
    for (int e = 0; e < kTideGroup; e++) {
      const float value = z[kTideGroup * g + e], magnitude = value < 0 ? -value : value;
      if (magnitude > largest) largest = magnitude;
    }
    if (largest / end > wanted) wanted = largest / end;
  }
  int low = 1, high = 255;  // the byte is among these
  while (low < high) {
    const int middle = (low + high) / 2;
    if (TideGain(middle) >= wanted) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return static_cast<uint8_t>(low);
}

}  // namespace kvtide
