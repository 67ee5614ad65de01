// Lloyd-Max levels for N(0,1) rounded to 7-bit integers, and the encoder that all rotated types share. The
// integers are the definition of the format: MSE on N(0,1) is 0.2 % (4 bits) and 0.04 % (3 bits) above the
// real-valued levels, and encoder and decoder agree exactly on CPU and GPU. Levels of magnitude up to 63 also
// keep AVX2's vpmaddubsw free of saturation. Codes ascend with the level; a value on a midpoint takes the
// lower code.
//
// Scale: the unbiased one, |y|^2 / <y,c>, for keys and values alike, so that E[<q, x_hat>] = <q, x> and coded
// tokens compete fairly with the exact ones beside them. Least squares, <y,c> / |c|^2, costs the same bytes
// and has a lower error (13 % at 2 bits, 3 % at 3, 1 % at 4), but shrinks every vector by that share, which
// measures worse on either side (README.md).
#pragma once

#include <cmath>

#include "kernels/format/codec.h"

namespace kvtide {

// kSigma: the level that stands for one standard deviation. kLevelUnit keeps scales inside f16: a vector of
// 128 values of 65504, turned into one spike, does not saturate; one of rms 4e-4 has a normal scale, and
// smaller ones lose precision gradually down to 4e-7.
template <int kBits>
struct Codebook;

struct SevenBitLevels {
  static constexpr float kLevelUnit = 0.25f;
};
template <>
struct Codebook<2> : SevenBitLevels {
  static constexpr float kSigma = 39.73f;
  static KVTIDE_HD int Positive(int i) {
    const int levels[2] = {18, 60};
    return levels[i];
  }
};
template <>
struct Codebook<3> : SevenBitLevels {
  static constexpr float kSigma = 28.9f;
  static KVTIDE_HD int Positive(int i) {
    const int levels[4] = {7, 22, 39, 62};
    return levels[i];
  }
};
template <>
struct Codebook<4> : SevenBitLevels {
  static constexpr float kSigma = 22.3183f;
  static KVTIDE_HD int Positive(int i) {
    const int levels[8] = {3, 9, 15, 21, 28, 36, 46, 61};
    return levels[i];
  }
};

// BookT: other levels than those above (wht4.h).
template <int kBitsT, class RotationT, class BookT = Codebook<kBitsT>>
struct CodebookCodec {
  static constexpr Storage kStorage = Storage::kCodes;
  static constexpr int kBits = kBitsT, kGroup = kMaxGroup, kVersion = 1;
  static constexpr float kLevelUnit = BookT::kLevelUnit;
  using Rotation = RotationT;
  using Stored = CodebookCodec<kBitsT, NoRotation, BookT>;
  using Book = BookT;
  static constexpr int kHalf = 1 << (kBits - 1);

  static KVTIDE_HD int Level(int code) {
    return code >= kHalf ? Book::Positive(code - kHalf) : -Book::Positive(kHalf - 1 - code);
  }

  static KVTIDE_HD uint16_t EncodeGroup(const float* y, int n, Side, uint8_t* codes) {
    const float energy = TreeSum(n, [&](int i) { return Mul(y[i], y[i]); });
    if (!(energy > 0)) {
      for (int i = 0; i < n; i++) codes[i] = kHalf;
      return 0;
    }
    const float to_level = Book::kSigma / std::sqrt(energy / static_cast<float>(n));
    for (int i = 0; i < n; i++) {
      const float v = Mul(y[i], to_level), magnitude = v < 0 ? -v : v;
      int above = 0;
      for (int m = 0; m + 1 < kHalf; m++)
        above += magnitude > 0.5f * static_cast<float>(Book::Positive(m) + Book::Positive(m + 1)) ? 1 : 0;
      codes[i] = static_cast<uint8_t>(v > 0 ? kHalf + above : kHalf - 1 - above);
    }
    const float dot = TreeSum(n, [&](int i) { return Mul(y[i], static_cast<float>(Level(codes[i]))); });
    return ScaleBits(Mul(energy / dot, 1.0f / kLevelUnit));
  }
};

}  // namespace kvtide
