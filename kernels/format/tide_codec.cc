#include "kernels/format/tide_codec.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/base/float16.h"
#include "kernels/format/tide.h"

namespace kvtide {
namespace {

// For every byte of a plane: where it is, its first code in [64][dim] codes, and its bit there.
template <class Visit>
void VisitPlane(int dim, const uint8_t* widths, Visit visit) {
  size_t unit = 0;
  for (int g = 0; g < dim / kTideGroup; g++)
    for (int b = 0; b < widths[g]; b++, unit++)
      for (int t = 0; t < kBlockTokens; t++)
        visit(unit * kTideUnitBytes + static_cast<size_t>(TideByte(t, g)),
              static_cast<size_t>(t * dim + g * kTideGroup), b);
}

}  // namespace

void EncodeTideHalf(CacheType type, const HalfLayout& layout, const HeadProfile& head, int64_t position,
                    const float* rows, int tokens, std::byte* half) {
  const int dim = layout.head_dim, stored = layout.stored_dim;
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  std::memset(half, 0, layout.bytes);
  std::vector<uint8_t> codes(static_cast<size_t>(kBlockTokens * stored));
  auto* gains = reinterpret_cast<uint8_t*>(half + layout.code_bytes);
  for (int t = 0; t < tokens; t++) {
    float x[kMaxTideDim], z[kMaxTideDim] = {};
    std::copy_n(rows + static_cast<size_t>(t) * static_cast<size_t>(dim), dim, x);
    TurnKey(head.rope, position, t, true, x);
    for (int i = 0; i < dim; i++) {
      x[i] -= head.centre[static_cast<size_t>(i)];
      const float* transform = head.transform.data() + static_cast<size_t>(i) * static_cast<size_t>(dim);
      for (int j = 0; j < dim; j++) z[j] = MulAdd(x[i], transform[j], z[j]);
    }
    gains[t] = TideGainByte(z, widths.data(), stored);
    const float gain = TideGain(gains[t]);
    for (int j = 0; j < stored; j++)
      if (const int width = widths[static_cast<size_t>(j / kTideGroup)]; width > 0)
        codes[static_cast<size_t>(t * stored + j)] =
            static_cast<uint8_t>(TideCode(width, Mul(z[j], TideSigma(width) / gain)));
  }
  auto* plane = reinterpret_cast<uint8_t*>(half);
  VisitPlane(stored, widths.data(), [&](size_t byte, size_t code, int bit) {
    for (size_t e = 0; e < kTideGroup; e++)
      plane[byte] = static_cast<uint8_t>(plane[byte] | (codes[code + e] >> bit & 1) << e);
  });
}

void DecodeTideHalf(CacheType type, const HalfLayout& layout, const HeadProfile& head, int64_t position,
                    const std::byte* half, float* rows) {
  const size_t dim = static_cast<size_t>(layout.head_dim), stored = static_cast<size_t>(layout.stored_dim);
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  std::vector<float> levels(kBlockTokens * stored);
  DecodeTideLevels(type, layout, head, half, levels.data());
  std::vector<float> columns(dim * dim);
  for (size_t i = 0; i < dim; i++)
    for (size_t j = 0; j < dim; j++) columns[j * dim + i] = head.inverse[i * dim + j];
  for (size_t t = 0; t < kBlockTokens; t++) {
    float* row = rows + t * dim;
    std::fill_n(row, dim, 0.0f);
    for (size_t j = 0; j < dim; j++) {
      const float z = levels[t * stored + j] / TideSigma(widths[j / kTideGroup]);
      for (size_t i = 0; i < dim; i++) row[i] = MulAdd(z, columns[j * dim + i], row[i]);
    }
    for (size_t i = 0; i < dim; i++) row[i] += head.centre[i];
    TurnKey(head.rope, position, static_cast<int>(t), false, row);
  }
}

void DecodeTideLevels(CacheType type, const HalfLayout& layout, const HeadProfile& head,
                      const std::byte* half, float* rows) {
  const size_t stored = static_cast<size_t>(layout.stored_dim);
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  std::vector<uint8_t> codes(kBlockTokens * stored);
  const auto* plane = reinterpret_cast<const uint8_t*>(half);
  VisitPlane(layout.stored_dim, widths.data(), [&](size_t byte, size_t code, int bit) {
    for (size_t e = 0; e < kTideGroup; e++)
      codes[code + e] = static_cast<uint8_t>(codes[code + e] | (plane[byte] >> e & 1) << bit);
  });
  const auto* gains = reinterpret_cast<const uint8_t*>(half + layout.code_bytes);
  for (size_t t = 0; t < kBlockTokens; t++)
    for (size_t j = 0; j < stored; j++)
      rows[t * stored + j] = Mul(
          TideGain(gains[t]), static_cast<float>(TideLevel(widths[j / kTideGroup], codes[t * stored + j])));
}

float TurnTideQuery(CacheType type, const HeadProfile& head, int stored_dim, float* query) {
  const size_t dim = head.centre.size();
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  float bias = 0, turned[kMaxTideDim] = {};
  for (size_t i = 0; i < dim; i++) {
    bias += query[i] * head.centre[i];
    const float* inverse = head.inverse.data() + i * dim;
    for (size_t j = 0; j < dim; j++) turned[j] += query[i] * inverse[j];
  }
  for (size_t j = 0; j < static_cast<size_t>(stored_dim); j++) {
    const int width = widths[j / kTideGroup];
    query[j] = width == 0 ? 0.0f : turned[j] / TideSigma(width);
  }
  return bias;
}

}  // namespace kvtide
