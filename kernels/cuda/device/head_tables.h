// Device tables that a profile's heads each have: one after another, [layer][KV head][bytes].
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <type_traits>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"
#include "kernels/format/tide.h"
#include "kernels/format/tide_codec.h"

namespace kvtide::cuda {

// Groups of 8 coefficients of a calibrated head in the order in which tiles take them: by width, the widest
// first.
class GroupsByWidth {
 public:
  GroupsByWidth(CacheType type, const HeadProfile& head, int groups)
      : widths_(WidthsOf(type, head)), order_(static_cast<size_t>(groups)) {
    uint32_t units = 0;
    for (size_t g = 0; g < order_.size(); g++) {
      first_unit_.push_back(units);
      units += widths_[g];
    }
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return width_of(a) > width_of(b); });
  }

  size_t size() const { return order_.size(); }
  int operator[](size_t at) const { return order_[at]; }
  int width_of(int group) const { return int{widths_[static_cast<size_t>(group)]}; }
  int Above(int width) const {
    return static_cast<int>(
        std::count_if(order_.begin(), order_.end(), [&](int g) { return width_of(g) > width; }));
  }
  // Where a lane finds a group (LevelDecoder): the byte of its first bit plane, and its levels in the lookup.
  uint32_t SlotOf(int group) const {
    const uint32_t byte =
        first_unit_[static_cast<size_t>(group)] * kTideUnitBytes + static_cast<uint32_t>(group % 4 * 4);
    return byte | (32 * static_cast<uint32_t>(width_of(group))) << 16;
  }

 private:
  std::span<const uint8_t> widths_;
  std::vector<uint32_t> first_unit_;
  std::vector<int> order_;
};

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
