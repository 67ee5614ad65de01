// How much a buffer takes that has become too small.
#pragma once

#include <algorithm>
#include <cstddef>

namespace kvtide::cuda {

// At least `wanted` bytes, and half as much again as it had, so that wishes that grow step by step seldom
// take new memory; rounded up to 64 KiB. Never more than `most` unless `wanted` is.
inline size_t GrownSize(size_t had, size_t wanted, size_t most) {
  constexpr size_t kStep = size_t{64} << 10;
  const size_t grown = (std::max(wanted, had + had / 2) + kStep - 1) / kStep * kStep;
  return std::max(wanted, std::min(grown, most));
}

}  // namespace kvtide::cuda
