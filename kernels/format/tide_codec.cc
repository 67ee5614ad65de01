#include "kernels/format/tide_codec.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/base/float16.h"
#include "kernels/format/tide.h"

namespace kvtide {
namespace {

// The codes [64][dim] of a plane, or the plane of codes.
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

void EncodeTideHalf(CacheType type, const HalfLayout& layout, const HeadProfile& head, const float* rows,
                    int tokens, std::byte* half) {
  const int dim = layout.head_dim, stored = layout.stored_dim;
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  std::memset(half, 0, layout.bytes);
  std::vector<uint8_t> codes(static_cast<size_t>(kBlockTokens * stored));
  auto* scales = reinterpret_cast<uint16_t*>(half + layout.code_bytes);
  for (int t = 0; t < tokens; t++) {
    const float* row = rows + static_cast<size_t>(t) * static_cast<size_t>(dim);
    float z[kMaxTideDim] = {};
    for (int i = 0; i < dim; i++) {
      const float x = head.mean.empty() ? row[i] : row[i] - head.mean[static_cast<size_t>(i)];
      const float* transform = head.transform.data() + static_cast<size_t>(i) * static_cast<size_t>(dim);
      for (int j = 0; j < dim; j++) z[j] = MulAdd(x, transform[j], z[j]);
    }
    scales[t] = TideScale(z, widths.data(), stored);
    const float scale = F16ToF32(scales[t]);
    for (int j = 0; j < stored; j++)
      if (const int width = widths[static_cast<size_t>(j / kTideGroup)]; width > 0)
        codes[static_cast<size_t>(t * stored + j)] =
            static_cast<uint8_t>(TideCode(width, Mul(z[j], TideSigma(width) / scale)));
  }
  auto* plane = reinterpret_cast<uint8_t*>(half);
  VisitPlane(stored, widths.data(), [&](size_t byte, size_t code, int bit) {
    for (size_t e = 0; e < kTideGroup; e++)
      plane[byte] = static_cast<uint8_t>(plane[byte] | (codes[code + e] >> bit & 1) << e);
  });
}

void DecodeTideLevels(const HalfLayout& layout, const uint8_t* widths, const std::byte* half, float* rows) {
  const int stored = layout.stored_dim;
  std::vector<uint8_t> codes(static_cast<size_t>(kBlockTokens * stored));
  const auto* plane = reinterpret_cast<const uint8_t*>(half);
  VisitPlane(stored, widths, [&](size_t byte, size_t code, int bit) {
    for (size_t e = 0; e < kTideGroup; e++)
      codes[code + e] = static_cast<uint8_t>(codes[code + e] | (plane[byte] >> e & 1) << bit);
  });
  const auto* scales = reinterpret_cast<const uint16_t*>(half + layout.code_bytes);
  for (int t = 0; t < kBlockTokens; t++)
    for (int j = 0; j < stored; j++) {
      const size_t at = static_cast<size_t>(t * stored + j);
      rows[at] = Mul(F16ToF32(scales[t]), static_cast<float>(TideLevel(widths[j / kTideGroup], codes[at])));
    }
}

void DecodeTideHalf(CacheType type, const HalfLayout& layout, const HeadProfile& head, const std::byte* half,
                    float* rows) {
  const size_t dim = static_cast<size_t>(layout.head_dim), stored = static_cast<size_t>(layout.stored_dim);
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  std::vector<float> levels(kBlockTokens * stored), columns(dim * dim);
  DecodeTideLevels(layout, widths.data(), half, levels.data());
  for (size_t i = 0; i < dim; i++)
    for (size_t j = 0; j < dim; j++) columns[j * dim + i] = head.inverse[i * dim + j];
  for (size_t t = 0; t < kBlockTokens; t++) {
    float* row = rows + t * dim;
    std::fill_n(row, dim, 0.0f);
    for (size_t j = 0; j < dim; j++) {
      const float z = levels[t * stored + j] / TideSigma(widths[j / kTideGroup]);
      for (size_t i = 0; i < dim; i++) row[i] = MulAdd(z, columns[j * dim + i], row[i]);
    }
    for (size_t i = 0; i < dim && !head.mean.empty(); i++) row[i] += head.mean[i];
  }
}

void TurnTideQuery(CacheType type, int head_dim, const HeadProfile& head, const float* q, float* turned) {
  const size_t dim = static_cast<size_t>(head_dim);
  const std::span<const uint8_t> widths = WidthsOf(type, head);
  std::fill_n(turned, widths.size() * kTideGroup, 0.0f);
  for (size_t i = 0; i < dim; i++) {
    const float* inverse = head.inverse.data() + i * dim;
    for (size_t j = 0; j < dim; j++) turned[j] += q[i] * inverse[j];
  }
  for (size_t j = 0; j < dim; j++) {
    const int width = widths[j / kTideGroup];
    turned[j] = width == 0 ? 0.0f : turned[j] / TideSigma(width);
  }
}

}  // namespace kvtide
