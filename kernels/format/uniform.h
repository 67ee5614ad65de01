// Cache types q8_0, q5_0 and q4_0: uniform levels, one f16 scale for 32 values, no rotation. The rounding
// follows ggml (ggml-org/ggml, ggml-quants): q8_0 has d = amax/127; q5_0 and q4_0 have d = (signed
// maximum)/-16 and /-8 with levels code-16 and code-8. The codes are the same, their order in memory is
// kvtide's (page_order.h).
//
// Scale: q8_0 has ggml's d. q5_0 and q4_0 have the unbiased scale |y|^2 / <y, levels> instead: the largest
// value on the side opposite to the signed maximum is clipped by one level, which takes 0.06 % (q5_0) and
// 0.24 % (q4_0) off every dot product, and coded tokens have to compete with exact ones. It also has a
// slightly lower error (0.0072 against 0.0074).
#pragma once

#include "kernels/format/codec.h"

namespace kvtide {

// The value of largest magnitude of y[0..n), the first of equals, with its sign; 0 if it is below 1e-30,
// where no f16 scale could hold it and its inverse would overflow.
KVTIDE_HD inline float SignedMaximum(const float* y, int n) {
  float best = 0, magnitude = 0;
  for (int i = 0; i < n; i++) {
    const float a = y[i] < 0 ? -y[i] : y[i];
    if (a > magnitude) {
      magnitude = a;
      best = y[i];
    }
  }
  return magnitude < 1e-30f ? 0.0f : best;
}

struct Q8_0 {
  static constexpr char kName[] = "q8_0";
  static constexpr Storage kStorage = Storage::kCodes;
  static constexpr int kBits = 8, kGroup = 32, kVersion = 1;
  static constexpr float kLevelUnit = 1.0f;
  using Rotation = NoRotation;
  using Stored = Q8_0;
  // The code is the two's complement byte of the level.
  static KVTIDE_HD int Level(int code) { return code < 128 ? code : code - 256; }
  static KVTIDE_HD uint16_t EncodeGroup(const float* y, int n, Side, uint8_t* codes) {
    const float m = SignedMaximum(y, n), amax = m < 0 ? -m : m;
    const float d = amax / 127.0f, inverse = amax > 0 ? 127.0f / amax : 0.0f;
    for (int i = 0; i < n; i++) {
      const float v = Mul(y[i], inverse);
      const int level = v < 0 ? -static_cast<int>(0.5f - v) : static_cast<int>(v + 0.5f);
      codes[i] = static_cast<uint8_t>(level);
    }
    return ScaleBits(d);
  }
};

template <int kHalfRange>
struct UniformOffset {
  static constexpr Storage kStorage = Storage::kCodes;
  static constexpr int kGroup = 32, kVersion = 1;
  static constexpr float kLevelUnit = 1.0f;
  using Rotation = NoRotation;
  static KVTIDE_HD int Level(int code) { return code - kHalfRange; }
  static KVTIDE_HD uint16_t EncodeGroup(const float* y, int n, Side, uint8_t* codes) {
    const float m = SignedMaximum(y, n);
    const float inverse = m != 0 ? static_cast<float>(-kHalfRange) / m : 0.0f;
    for (int i = 0; i < n; i++) {
      const int code = static_cast<int>(MulAdd(y[i], inverse, static_cast<float>(kHalfRange) + 0.5f));
      codes[i] = static_cast<uint8_t>(code < 2 * kHalfRange ? code : 2 * kHalfRange - 1);
    }
    if (m == 0) return 0;
    const float energy = TreeSum(n, [&](int i) { return Mul(y[i], y[i]); });
    return ScaleBits(energy /
                     TreeSum(n, [&](int i) { return Mul(y[i], static_cast<float>(Level(codes[i]))); }));
  }
};

struct Q5_0 : UniformOffset<16> {
  static constexpr char kName[] = "q5_0";
  static constexpr int kBits = 5;
  using Stored = Q5_0;
};
struct Q4_0 : UniformOffset<8> {
  static constexpr char kName[] = "q4_0";
  static constexpr int kBits = 4;
  using Stored = Q4_0;
};

}  // namespace kvtide
