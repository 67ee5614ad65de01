#include "kernels/cuda/device/tide_tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/base/float16.h"
#include "kernels/cuda/device/head_tables.h"
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

// Coefficient of the lower (or `high`) half of register `reg` of product `product` of a step of 32.
int CoefficientOf(int step, int c, int product, int reg, int high) {
  return 32 * step + 8 * c + 2 * product + reg + 4 * high;
}

uint32_t Halves(float low, float high) { return F32ToF16(low) | static_cast<uint32_t>(F32ToF16(high)) << 16; }

template <int D>
void MakeHead(const HeadProfile& head, CacheType type, std::byte* to) {
  using T = TideTables<D>;
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  const int dim = static_cast<int>(head.centre.size()),
            turned = static_cast<int>(head.rope.frequencies.size());
  const std::vector<std::pair<int, int>> pairs = PairsOf<D>(head);
  const auto put = [to](int at, const auto& value) { std::memcpy(to + at, &value, sizeof(value)); };

  float largest = 0;
  for (const float x : head.inverse) largest = std::max(largest, std::abs(x));
  int exponent = 0;
  (void)std::frexp(largest, &exponent);
  const float inverse_unit = std::ldexp(1.0f, -exponent), unit = kCoefficientUnit * inverse_unit;
  put(T::kUnit, 1.0f / unit);
  int used = 1;
  for (int g = 0; g < D / kTideGroup; g++)
    if (widths[static_cast<size_t>(g)] > 0) used = g / 4 + 1;
  put(T::kUsed, int32_t{used});

  const auto inverse = [&](int channel, int coefficient) {
    if (channel < 0 || coefficient >= dim || widths[static_cast<size_t>(coefficient / kTideGroup)] == 0)
      return 0.0f;
    return head.inverse[static_cast<size_t>(channel * dim + coefficient)] * inverse_unit;
  };
  const auto centre = [&](int channel) {
    return channel < 0 ? 0.0f : head.centre[static_cast<size_t>(channel)] * unit;
  };
  for (int s = 0; s < T::kSteps; s++)
    for (int lane = 0; lane < 32; lane++) {
      const int n = lane >> 2, c = lane & 3;
      for (int k = 0; k < T::kSteps; k++)
        for (int word = 0; word < 4; word++) {
          const auto& [first, second] = pairs[static_cast<size_t>(8 * s + n)];
          const int channel = word < 2 ? first : second;
          put(s * T::kStepBytes + T::kInverse + k * 512 + lane * 16 + word * 4,
              Halves(inverse(channel, CoefficientOf(k / 2, c, k % 2, word % 2, 0)),
                     inverse(channel, CoefficientOf(k / 2, c, k % 2, word % 2, 1))));
        }
      for (int m = 0; m < 4; m++)
        for (int high = 0; high < 2; high++) {
          CosSin angles[2] = {{1, 0}, {1, 0}};
          for (int e = 0; e < 2; e++)
            if (const int pair = 8 * s + 2 * c + e; pair < turned)
              angles[e] = CosSinOf(PhaseOf(PerPosition(head.rope.frequencies[static_cast<size_t>(pair)]), 0,
                                           T::TokenOf(m, n, high == 1)));
          const int at = s * T::kStepBytes + T::kRope + m * 512 + lane * 16 + high * 8;
          put(at, Halves(angles[0].cos, angles[1].cos));
          put(at + 4, Halves(angles[0].sin, angles[1].sin));
        }
      for (int i = 0; i < 8; i++) {
        const auto& pair = pairs[static_cast<size_t>(8 * s + 2 * c + i % 2)];
        put(s * T::kStepBytes + T::kCentre + i / 4 * 512 + lane * 16 + i % 4 * 4,
            centre(i < 4 ? pair.first : pair.second));
      }
    }
  for (int i = 0; i < turned; i++)
    put(T::kPhases + i * 8, PerPosition(head.rope.frequencies[static_cast<size_t>(i)]));
  uint32_t at = 0, first_unit[D / kTideGroup];
  for (int g = 0; g < D / kTideGroup; g++) {
    first_unit[g] = at;
    at += widths[static_cast<size_t>(g)];
  }
  for (int g = 0; g < D / kTideGroup; g++) {
    const uint8_t* const four = widths.data() + g / 4 * 4;
    const uint32_t most = *std::max_element(four, four + 4);
    put(T::kGroups + (g % 4 * 4 + g / 4) * 4,
        first_unit[g] | widths[static_cast<size_t>(g)] << 8 | most << 16);
  }
  int none = D;  // channels that there are not
  for (int i = 0; i < D / 2; i++)
    for (int second = 0; second < 2; second++) {
      const auto& pair = pairs[static_cast<size_t>(i)];
      const int channel = second == 0 ? pair.first : pair.second;
      put(T::kPlaces + (channel >= 0 ? channel : --none) * 2, static_cast<uint16_t>(T::PlaceOf(i, second)));
    }
}

}  // namespace

std::vector<std::byte> MakeTideTables(const Profile& profile, CacheType type) {
  return MakeHeadTables(
      profile, TideTableBytes(StoredDim(profile.shape.head_dim_k)),
      [type](auto dim, const HeadProfile& head, std::byte* to) { MakeHead<dim>(head, type, to); });
}

}  // namespace kvtide::cuda
