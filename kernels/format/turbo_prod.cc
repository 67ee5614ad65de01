#include "kernels/format/turbo_prod.h"

#include <cmath>
#include <cstddef>
#include <numbers>
#include <random>

#include "kernels/base/check.h"
#include "kernels/format/turbo.h"

namespace kvtide {
namespace {

// Codes of C with the least-squares scale: the sketch codes what is left, so that should be small.
template <class C>
float Quantise(const float* y, uint8_t* codes) {
  C::EncodeGroup(y, TurboProd::kDim, Side::kKey, codes);
  double dot = 0, squares = 0;
  for (int i = 0; i < TurboProd::kDim; i++) {
    const double level = C::Level(codes[i]);
    dot += static_cast<double>(y[i]) * level;
    squares += level * level;
  }
  return F16ToF32(ScaleBits(static_cast<float>(dot / squares / static_cast<double>(C::kLevelUnit)))) *
         C::kLevelUnit;
}

}  // namespace

TurboProd::TurboProd(int bits, uint64_t seed) : bits_(bits), projection_(static_cast<size_t>(kDim * kDim)) {
  KVTIDE_CHECK(bits == 3 || bits == 4, "turbo-prod of ", bits, " bits");
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> normal;
  for (float& p : projection_) p = normal(generator);
}

TurboProd::Coded TurboProd::Encode(const float* x) const {
  Coded coded;
  float y[kDim];
  for (int i = 0; i < kDim; i++) y[i] = x[i];
  Hadamard::Forward(y, kDim);
  coded.scale =
      bits_ == 4 ? Quantise<Turbo3>(y, coded.codes.data()) : Quantise<Turbo2>(y, coded.codes.data());
  double norm = 0;
  for (int i = 0; i < kDim; i++) {
    const uint8_t code = coded.codes[static_cast<size_t>(i)];
    y[i] -= coded.scale * static_cast<float>(bits_ == 4 ? Turbo3::Level(code) : Turbo2::Level(code));
    norm += static_cast<double>(y[i]) * static_cast<double>(y[i]);
  }
  coded.residual_norm = F16ToF32(ScaleBits(static_cast<float>(std::sqrt(norm))));
  for (int r = 0; r < kDim; r++) {
    double sum = 0;
    for (int i = 0; i < kDim; i++)
      sum += static_cast<double>(projection_[static_cast<size_t>(r * kDim + i)]) * static_cast<double>(y[i]);
    coded.signs[static_cast<size_t>(r)] = sum >= 0;
  }
  return coded;
}

void TurboProd::Decode(const Coded& coded, float* x) const {
  const double factor = std::sqrt(std::numbers::pi / 2) / kDim * static_cast<double>(coded.residual_norm);
  for (int i = 0; i < kDim; i++) {
    double sum = 0;
    for (int r = 0; r < kDim; r++) {
      const double p = static_cast<double>(projection_[static_cast<size_t>(r * kDim + i)]);
      sum += coded.signs[static_cast<size_t>(r)] ? p : -p;
    }
    const uint8_t code = coded.codes[static_cast<size_t>(i)];
    const float level = static_cast<float>(bits_ == 4 ? Turbo3::Level(code) : Turbo2::Level(code));
    x[i] = coded.scale * level + static_cast<float>(factor * sum);
  }
  Hadamard::Inverse(x, kDim);
}

}  // namespace kvtide
