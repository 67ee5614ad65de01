// turbo-prod: the inner-product variant of TurboQuant, for measurement only. It codes a vector with b-1 bits
// as turbo does and spends the last bit on the signs of a Gaussian projection of what is left (a 1-bit QJL
// sketch), so that dot products are unbiased over the choice of the projection. It is no cache type: a value
// is not level x scale, so no kernel attends over it. And it need not be one: the variance of a dot product
// is pi/2 D(b-1) / d, five times that of the unbiased scale which the other types store for keys, D(b) / (1 -
// D(b)) / d, and it costs a second norm.
//
// Immutable after construction; may be used from any thread. Fixed dim 128, the group of the codebook types.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace kvtide {

class TurboProd {
 public:
  static constexpr int kDim = 128;
  struct Coded {
    std::array<uint8_t, kDim> codes;  // b-1 bits each
    std::array<bool, kDim> signs;     // of the projected residual
    float scale;                      // f16 value
    float residual_norm;              // f16 value
  };

  // bits: 3 or 4, the sign bit included. `seed` chooses the projection.
  TurboProd(int bits, uint64_t seed);

  Coded Encode(const float* x) const;
  void Decode(const Coded& coded, float* x) const;
  // Stored bits per value: codes, signs and two f16.
  double BitsPerValue() const { return bits_ + 2.0 * 16 / kDim; }

 private:
  int bits_;
  std::vector<float> projection_;  // [128][128], standard normal
};

}  // namespace kvtide
