#include "kernels/cuda/device/tide_tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/base/float16.h"
#include "kernels/cuda/device/head_tables.h"
#include "kernels/cuda/device/level_tables.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {
namespace {

// The channels of all pairs; -1 where the stored dim has none.
template <int D>
std::vector<std::pair<int, int>> PairsOf(const HeadProfile& head) {
  const int turned = static_cast<int>(head.rope.frequencies.size()),
            dim = static_cast<int>(head.centre.size());
  std::vector<std::pair<int, int>> pairs;
  std::vector<bool> taken(D);
  for (int i = 0; i < turned; i++) {
    pairs.emplace_back(PairFirstChannel(head.rope.pairs, i), PairSecondChannel(head.rope.pairs, i, turned));
    taken[static_cast<size_t>(pairs.back().first)] = taken[static_cast<size_t>(pairs.back().second)] = true;
  }
  std::vector<int> rest;
  for (int i = 0; i < D; i++)
    if (!taken[static_cast<size_t>(i)]) rest.push_back(i < dim ? i : -1);
  for (size_t i = 0; i < rest.size(); i += 2) pairs.emplace_back(rest[i], rest[i + 1]);
  return pairs;
}

uint32_t Halves(float low, float high) { return F32ToF16(low) | static_cast<uint32_t>(F32ToF16(high)) << 16; }

template <int D>
void MakeHead(const HeadProfile& head, CacheType type, std::byte* to) {
  using T = TideTables<D>;
  const GroupsByWidth order(type, head, D / kTideGroup);
  const int dim = static_cast<int>(head.centre.size()),
            turned = static_cast<int>(head.rope.frequencies.size());
  const std::vector<std::pair<int, int>> pairs = PairsOf<D>(head);
  const auto put = [to](int at, const auto& value) { std::memcpy(to + at, &value, sizeof(value)); };
  for (int at = 0; at < static_cast<int>(order.size()); at++) {
    const int g = order[static_cast<size_t>(at)];
    put(T::kSlots + (at % 4 * 4 + at / 4) * 4, order.SlotOf(g));
    if (at % 4 == 0) put(T::kWidths + at / 4, static_cast<uint8_t>(order.width_of(g)));
  }

  // What a coefficient's level is multiplied by, in a channel; and the scale of a pair.
  const auto inverse = [&](int channel, int coefficient) {
    const int width = order.width_of(coefficient / kTideGroup);
    if (channel < 0 || coefficient >= dim || width == 0) return 0.0f;
    return head.inverse[static_cast<size_t>(channel * dim + coefficient)] / RebuiltSigma(width);
  };
  const auto centre = [&](int channel) {
    return channel < 0 ? 0.0f : head.centre[static_cast<size_t>(channel)];
  };
  std::vector<float> scales;
  for (const auto& [first, second] : pairs) {
    float largest = 0;
    for (int j = 0; j < dim; j++)
      largest = std::max({largest, std::abs(inverse(first, j)), std::abs(inverse(second, j))});
    // Means of channels that hardly differ must fit in halves.
    const float mean = std::max(std::abs(centre(first)), std::abs(centre(second)));
    const float scale = std::max(largest / 127, mean * (kKeyUnit / 16384));
    scales.push_back(scale > 0 ? scale : 1.0f);
  }
  const auto rounded = [&](int pair, int channel, int coefficient) {
    return static_cast<int>(std::lrint(inverse(channel, coefficient) / scales[static_cast<size_t>(pair)]));
  };

  for (int s = 0; s < T::kSteps; s++) {
    const int step = s * T::kStepBytes;
    for (int lane = 0; lane < 32; lane++) {
      const int n = lane >> 2, c = lane & 3;
      for (int k = 0; k < T::kGroupSteps; k++)
        for (int byte = 0; byte < 16; byte++) {
          const int pair = 8 * s + n, group = order[static_cast<size_t>(4 * k + c)];
          const auto& [first, second] = pairs[static_cast<size_t>(pair)];
          const bool wide = order.width_of(order[static_cast<size_t>(4 * k)]) > 4;
          const int coefficient =
              kTideGroup * group + LevelTables<D>::CoefficientOf(wide, byte / 4 % 2, byte % 4);
          put(step + T::kInverse + k * 512 + lane * 16 + byte,
              static_cast<int8_t>(rounded(pair, byte < 8 ? first : second, coefficient)));
        }
      for (int i = 0; i < 2; i++)
        for (int high = 0; high < 2; high++) {
          CosSin angles[2] = {{1, 0}, {1, 0}};
          for (int e = 0; e < 2; e++)
            if (const int pair = 8 * s + 2 * c + e; pair < turned)
              angles[e] = CosSinOf(PhaseOf(PerPosition(head.rope.frequencies[static_cast<size_t>(pair)]), 0,
                                           4 * n + 2 * high + i));
          const int at = step + T::kRope + i * 512 + lane * 16 + high * 8;
          put(at, Halves(angles[0].cos, angles[1].cos));
          put(at + 4, Halves(angles[0].sin, angles[1].sin));
        }
    }
    for (int c = 0; c < 4; c++)
      for (int i = 0; i < 4; i++) {
        const int pair = 8 * s + 2 * c + i % 2;
        const auto& [first, second] = pairs[static_cast<size_t>(pair)];
        const int channel = i < 2 ? first : second;
        int offset = 0;
        for (size_t at = 0; at < order.size(); at++)
          if (order.width_of(order[at / 4 * 4]) == 4)
            for (int e = 0; e < kTideGroup; e++)
              offset += kJoinedOffset * rounded(pair, channel, kTideGroup * order[at] + e);
        const int back = T::kBack + (4 * s + c) * T::kBackBytes;
        put(back + i * 4, -(kKeyStart + static_cast<float>(offset) * kKeyUnit));
        put(back + 16 + i * 2, F32ToF16(centre(channel) / scales[static_cast<size_t>(pair)] * kKeyUnit));
      }
  }
  for (int i = 0; i < turned; i++)
    put(T::kPhases + i * 8, PerPosition(head.rope.frequencies[static_cast<size_t>(i)]));
  int none = D;  // channels that there are not
  for (int i = 0; i < D / 2; i++)
    for (int second = 0; second < 2; second++) {
      const auto& pair = pairs[static_cast<size_t>(i)];
      const int channel = second == 0 ? pair.first : pair.second, at = channel >= 0 ? channel : --none;
      put(T::kPlaces + at * 2, static_cast<uint16_t>(T::PlaceOf(i, second)));
      put(T::kScales + at * 4, scales[static_cast<size_t>(i)]);
    }
}

}  // namespace

std::vector<std::byte> MakeTideTables(const Profile& profile, CacheType type) {
  return MakeHeadTables(
      profile, TideTableBytes(StoredDim(profile.shape.head_dim_k)),
      [type](auto dim, const HeadProfile& head, std::byte* to) { MakeHead<dim>(head, type, to); });
}

}  // namespace kvtide::cuda
