// Products and sums of sizes that stay at the largest int64_t instead of wrapping around. Whoever plans 2^25
// tokens for 2^20 sequences asks for more bytes than a number holds: the answer is "does not fit", so a bound
// that is not exact beyond 8 EiB is right, and no size is ever negative.
#pragma once

#include <concepts>
#include <cstdint>

#include "kernels/base/sizes.h"

namespace kvtide::planner {

template <std::integral... Factors>
constexpr int64_t Product(Factors... factors) {
  int64_t product = 1;
  ((product = SaturatingMul<int64_t>(product, static_cast<int64_t>(factors))), ...);
  return product;
}

template <std::integral... Terms>
constexpr int64_t Sum(Terms... terms) {
  int64_t sum = 0;
  ((sum = SaturatingAdd<int64_t>(sum, static_cast<int64_t>(terms))), ...);
  return sum;
}

}  // namespace kvtide::planner
