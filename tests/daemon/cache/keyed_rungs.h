// What blocks of a namespace become when they are recoded, naively: each row by the definition of the bytes
// (kernels/format/page_codec.h), without blocks, pages and backends.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "daemon/cache/call/name_space.h"

namespace kvtide::testing {

// The rows of one block in a dense payload of f16, as a load gives them when the block was stored in the
// spec's pair and then recoded as each of `rungs`, one after another.
std::vector<std::byte> AfterRungs(const NamespaceSpec& spec, std::span<const std::byte> rows,
                                  std::span<const CachePair> rungs);

// The largest and the mean difference of two payloads of f16.
struct RowError {
  double largest = 0, mean = 0;
};
RowError ErrorOf(std::span<const std::byte> rows, std::span<const std::byte> exact);

}  // namespace kvtide::testing
