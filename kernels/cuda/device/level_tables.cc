#include "kernels/cuda/device/level_tables.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/base/check.h"
#include "kernels/cuda/device/head_tables.h"

namespace kvtide::cuda {
namespace {

template <int D>
void MakeHead(const HeadProfile& head, CacheType type, std::byte* to) {
  using T = LevelTables<D>;
  constexpr int kGroups = D / kTideGroup;
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  const int dim = static_cast<int>(head.centre.size());
  const auto width_of = [&](int g) { return int{widths[static_cast<size_t>(g)]}; };

  uint32_t first_unit[kGroups], units = 0;
  for (int g = 0; g < kGroups; g++) {
    first_unit[g] = units;
    units += static_cast<uint32_t>(width_of(g));
  }
  std::vector<int> order(kGroups);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return width_of(a) > width_of(b); });
  const auto groups_above = [&](int width) {
    return static_cast<int>(
        std::count_if(order.begin(), order.end(), [&](int g) { return width_of(g) > width; }));
  };

  LevelUnit<D> unit;
  unit.wide = (groups_above(4) + 1) / 2;
  const int quads = (std::max(0, groups_above(0) - 2 * unit.wide) + 3) / 4;
  unit.columns = 16 * unit.wide + 32 * quads;
  KVTIDE_CHECK(unit.columns <= T::kColumns, "widths of a calibrated head take ", unit.columns, " columns");

  const auto put = [to](int at, const auto& value) { std::memcpy(to + at, &value, sizeof(value)); };
  const auto put_column = [&](int column, int group, int e) {
    const int j = kTideGroup * group + e, width = width_of(group);
    for (int i = 0; i < dim && j < dim && width > 0; i++)
      put(T::kMatrix + (i * T::kColumns + column) * 4,
          head.inverse[static_cast<size_t>(i * dim + j)] / TideSigma(width));
  };
  size_t next = 0;  // of the order
  int column = 0;
  for (int s = 0; s < unit.wide + quads; s++) {
    const bool wide = s < unit.wide;
    if (!wide) unit.quads[4 - width_of(order[next])]++;
    for (int c = 0; c < 4; c++) {
      const size_t at = next + static_cast<size_t>(wide ? c / 2 : c);
      if (at < order.size()) {
        const int g = order[at];
        const auto width = static_cast<uint32_t>(width_of(g));
        const uint32_t place = first_unit[g] * kTideUnitBytes + static_cast<uint32_t>(g % 4 * 4);
        if (width > 0) unit.slots[s][c] = place | (32 * width) << 16;
        for (int i = 0; i < (wide ? 4 : 8); i++)
          put_column(column + i, g, wide ? 4 * (c % 2) + i : T::CoefficientOf(i / 4, i % 4));
      }
      column += wide ? 4 : 8;
    }
    next += wide ? 2 : 4;
  }
  put(T::kUnit, unit);
  for (int i = 0; i < dim; i++) put(T::kCentre + i * 4, head.centre[static_cast<size_t>(i)]);
}

}  // namespace

std::vector<std::byte> MakeLevelTables(const Profile& profile, CacheType type) {
  return MakeHeadTables(
      profile, LevelTableBytes(StoredDim(profile.shape.head_dim_k)),
      [type](auto dim, const HeadProfile& head, std::byte* to) { MakeHead<dim>(head, type, to); });
}

}  // namespace kvtide::cuda
