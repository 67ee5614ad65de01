// Device tables that a profile's heads each have: one after another, [layer][KV head][bytes].
#pragma once

#include <cstddef>
#include <type_traits>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"

namespace kvtide::cuda {

// make(std::integral_constant<int, D>, head, to) writes the `bytes` of a head of D stored values, 64 or 128.
template <class Make>
std::vector<std::byte> MakeHeadTables(const Profile& profile, size_t bytes, const Make& make) {
  const int stored = StoredDim(profile.shape.head_dim_k);
  KVTIDE_CHECK(stored == 64 || stored == 128, "no tables for keys of ", stored, " values");
  std::vector<std::byte> tables(profile.k.size() * bytes);
  for (size_t i = 0; i < profile.k.size(); i++) {
    std::byte* const to = tables.data() + i * bytes;
    if (stored == 64)
      make(std::integral_constant<int, 64>{}, profile.k[i], to);
    else
      make(std::integral_constant<int, 128>{}, profile.k[i], to);
  }
  return tables;
}

}  // namespace kvtide::cuda
