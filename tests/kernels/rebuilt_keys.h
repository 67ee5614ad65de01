// What keys of calibrated types are where they are rebuilt with transforms of 8 bits: a definition beside
// that of the bytes (format/tide.h), in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/device/tide_tables.h"
#include "kernels/format/rope.h"
#include "kernels/format/tide.h"
#include "kernels/format/tide_codec.h"

namespace kvtide::testing {

// Keys of a page as a backend may rebuild them (cuda/attend/tide_tile.h): levels of its own, and an inverse
// of 8 bits with one scale for each pair of channels.
inline std::vector<float> RebuiltKeys(CacheType type, const HalfLayout& layout, const HeadProfile& head,
                                      int64_t position, const std::byte* half) {
  const int dim = layout.head_dim, stored = layout.stored_dim,
            turned = static_cast<int>(head.rope.frequencies.size());
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  std::vector<int> other(static_cast<size_t>(dim), -1), rest;  // of its pair
  for (int i = 0; i < turned; i++) {
    const int a = PairFirstChannel(head.rope.pairs, i), b = PairSecondChannel(head.rope.pairs, i, turned);
    other[static_cast<size_t>(a)] = b;
    other[static_cast<size_t>(b)] = a;
  }
  for (int i = 0; i < dim; i++)
    if (other[static_cast<size_t>(i)] < 0) rest.push_back(i);
  for (size_t i = 0; i + 1 < rest.size(); i += 2) {
    other[static_cast<size_t>(rest[i])] = rest[i + 1];
    other[static_cast<size_t>(rest[i + 1])] = rest[i];
  }
  const auto inverse = [&](int i, int j) {
    const int width = widths[static_cast<size_t>(j / kTideGroup)];
    return i < 0 || width == 0 ? 0.0f
                               : head.inverse[static_cast<size_t>(i * dim + j)] / cuda::RebuiltSigma(width);
  };
  std::vector<float> levels(static_cast<size_t>(kBlockTokens * stored)),
      rows(static_cast<size_t>(kBlockTokens * dim));
  DecodeTideLevels(type, layout, head, half, levels.data());
  const auto* gains = reinterpret_cast<const uint8_t*>(half + layout.code_bytes);
  std::vector<std::vector<double>> matrix;
  for (int i = 0; i < dim; i++) {
    float largest = 0;
    for (int j = 0; j < dim; j++)
      largest =
          std::max({largest, std::fabs(inverse(i, j)), std::fabs(inverse(other[static_cast<size_t>(i)], j))});
    const double scale = largest > 0 ? static_cast<double>(largest / 127) : 1;
    std::vector<double>& row = matrix.emplace_back();
    for (int j = 0; j < dim; j++)
      row.push_back(std::nearbyint(static_cast<double>(inverse(i, j)) / scale) * scale);
  }
  for (int t = 0; t < kBlockTokens; t++) {
    const double gain = static_cast<double>(TideGain(gains[t]));
    std::vector<double> own;
    for (int j = 0; j < dim; j++) {
      const int width = widths[static_cast<size_t>(j / kTideGroup)];
      if (gain == 0) {  // there is no token
        own.push_back(0);
        continue;
      }
      const auto level = static_cast<int>(
          std::lrint(static_cast<double>(levels[static_cast<size_t>(t * stored + j)]) / gain));
      int code = 0;
      while (TideLevel(width, code) != level) code++;
      own.push_back(gain * cuda::RebuiltLevel(width, code));
    }
    float* const row = &rows[static_cast<size_t>(t * dim)];
    for (int i = 0; i < dim; i++) {
      double sum = static_cast<double>(head.centre[static_cast<size_t>(i)]);
      for (size_t j = 0; j < own.size(); j++) sum += matrix[static_cast<size_t>(i)][j] * own[j];
      row[i] = static_cast<float>(sum);
    }
    TurnKey(head.rope, position, t, false, row);
  }
  return rows;
}

}  // namespace kvtide::testing
