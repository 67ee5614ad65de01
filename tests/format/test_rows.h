// Deterministic rows for the tests of formats: a 64-bit generator and distributions that use no libm, so that
// golden files hold on every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvtide::test {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {  // SplitMix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int Below(int n) { return static_cast<int>(Next() % static_cast<uint64_t>(n)); }
  // Sum of 16 uniforms: mean 0, variance 1, exact arithmetic. Its tails end at 6.9.
  float Bell() {
    int64_t sum = 0;
    for (int i = 0; i < 16; i++) sum += static_cast<int64_t>(Next() >> 44);  // 20 bits each
    return static_cast<float>(sum - 16 * (1 << 19)) / 1210791.0f;            // 2^20 * sqrt(16 / 12)
  }

 private:
  uint64_t state_;
};

inline std::vector<float> BellRows(uint64_t seed, int rows, int dim) {
  Random random(seed);
  std::vector<float> x(static_cast<size_t>(rows) * static_cast<size_t>(dim));
  for (float& v : x) v = random.Bell();
  return x;
}

inline double Dot(const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

}  // namespace kvtide::test
