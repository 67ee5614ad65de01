#include "clients/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "clients/engine/vector_math.h"

namespace kvtide::engine {

int32_t ArgMax(std::span<const float> logits) {
  const float most = Maximum(logits.data(), logits.size());
  return static_cast<int32_t>(std::find(logits.begin(), logits.end(), most) - logits.begin());
}

// SplitMix64.
double Sampler::NextUniform() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

int32_t Sampler::Pick(std::span<const float> logits) {
  if (options_.temperature <= 0) return ArgMax(logits);
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const size_t kept = options_.top_k > 0 ? std::min<size_t>(options_.top_k, order.size()) : order.size();
  std::partial_sort(
      order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
      [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  std::vector<double> weight(kept);
  double total = 0;
  for (size_t i = 0; i < kept; ++i) {
    weight[i] = std::exp(static_cast<double>(logits[order[i]] - logits[order[0]]) / options_.temperature);
    total += weight[i];
  }
  double left = NextUniform() * total;
  for (size_t i = 0; i < kept; ++i) {
    left -= weight[i];
    if (left < 0) return order[i];
  }
  return order[0];
}

}  // namespace kvtide::engine
