#include "kernels/cuda/device/level_tables.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/check.h"
#include "kernels/cuda/device/head_tables.h"

namespace kvtide::cuda {
namespace {

template <int D>
void MakeHead(const HeadProfile& head, CacheType type, std::byte* to) {
  using T = LevelTables<D>;
  const GroupsByWidth order(type, head, D / kTideGroup);
  const int dim = static_cast<int>(head.centre.size());

  LevelUnit<D> unit;
  const int coded = order.Above(0), wide = order.Above(4), left_of_wide = wide % 4;
  unit.lead = left_of_wide == 1 || left_of_wide == 2 ? 1 : 0;
  const int rest = std::max(0, coded - 2 * unit.lead), quads = (rest + 1) / 4;
  const bool tail = rest > 4 * quads;
  unit.words = 4 * unit.lead + 8 * quads;
  const int steps = unit.lead + quads + (tail ? 1 : 0);
  KVTIDE_CHECK(steps <= LevelUnit<D>::kSteps && 4 * unit.words + (tail ? 16 : 0) <= T::kColumns,
               "groups of a calibrated head take ", steps, " steps");

  const auto put = [to](int at, const auto& value) { std::memcpy(to + at, &value, sizeof(value)); };
  const auto put_column = [&](int column, int group, int e) {
    const int j = kTideGroup * group + e, width = order.width_of(group);
    for (int i = 0; i < dim && j < dim && width > 0; i++)
      put(T::kMatrix + (i * T::kColumns + column) * 4,
          head.inverse[static_cast<size_t>(i * dim + j)] / TideSigma(width));
  };
  size_t next = 0;  // of the order
  int column = 0;
  for (int s = 0; s < steps; s++) {
    const int widest = order.width_of(order[next]);
    const bool lead = s < unit.lead, behind = s == unit.lead + quads, pair = lead || behind;
    const size_t groups = pair ? 2 : 4;
    if (behind)
      unit.tail = widest;
    else if (!lead)
      unit.quads[widest > 4 ? 0 : 5 - widest]++;
    for (size_t c = 0; c < 4; c++) {
      const size_t at = next + (pair ? c / 2 : c);
      if (at < order.size() && order.width_of(order[at]) > 0) unit.slots[s][c] = order.SlotOf(order[at]);
    }
    for (size_t i = 0; i < groups; i++, column += kTideGroup)
      for (int e = 0; e < kTideGroup && next + i < order.size(); e++)
        put_column(column + e, order[next + i], T::CoefficientOf(widest > 4, e / 4, e % 4));
    next += groups;
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
