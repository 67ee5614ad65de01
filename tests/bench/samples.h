// Times of a benchmark: how long ago something was, and which of many stands at a share of them.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

namespace kvtide::bench {

inline double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// share .5 is the median, .99 what a hundredth is above; 0 without values.
inline double At(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0
                        : values[std::min(values.size() - 1,
                                          static_cast<size_t>(share * static_cast<double>(values.size())))];
}

}  // namespace kvtide::bench
