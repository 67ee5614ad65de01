#include "tests/daemon/cache/keyed_rungs.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/base/float16.h"
#include "kernels/format/page_codec.h"

namespace kvtide::testing {
namespace {

float RowValue(const std::byte* at) {
  uint16_t half = 0;
  std::memcpy(&half, at, sizeof half);
  return F16ToF32(half);
}

// At most 64 rows, which have nothing to do with each other.
void Code(CacheType type, Side side, int dim, int rows, std::vector<float>& values) {
  const HalfLayout layout = MakeHalfLayout(type, dim);
  std::vector<std::byte> half(layout.bytes);
  EncodeHalf(type, side, layout, nullptr, values.data(), rows, half.data());
  DecodeHalf(type, side, layout, nullptr, half.data(), values.data());
}

}  // namespace

std::vector<std::byte> AfterRungs(const NamespaceSpec& spec, std::span<const std::byte> rows,
                                  std::span<const CachePair> rungs) {
  std::vector<CachePair> pairs{spec.tensors->pair};
  pairs.insert(pairs.end(), rungs.begin(), rungs.end());
  std::vector<std::byte> after(rows.begin(), rows.end());
  std::byte* at = after.data();
  for (int layer = 0; layer < spec.tensors->layers; layer++)
    for (const Side side : {Side::kKey, Side::kValue}) {
      const bool key = side == Side::kKey;
      const int dim = key ? spec.tensors->head_dim_k : spec.tensors->head_dim_v;
      const int rows_of_side = spec.block_tokens * spec.tensors->kv_heads;
      for (int first = 0; first < rows_of_side; first += kBlockTokens) {
        const int count = std::min(kBlockTokens, rows_of_side - first);
        std::vector<float> values(static_cast<size_t>(kBlockTokens) * static_cast<size_t>(dim));
        for (int i = 0; i < count * dim; i++) values[static_cast<size_t>(i)] = RowValue(at + 2 * i);
        CacheType was = ExactPair().k;
        for (const CachePair& pair : pairs) {
          const CacheType type = key ? pair.k : pair.v;
          if (type != was) Code(type, side, dim, count, values);
          was = type;
        }
        for (int i = 0; i < count * dim; i++, at += 2) {
          const uint16_t half = F32ToF16(values[static_cast<size_t>(i)]);
          std::memcpy(at, &half, sizeof half);
        }
      }
    }
  return after;
}

RowError ErrorOf(std::span<const std::byte> rows, std::span<const std::byte> exact) {
  RowError error;
  double sum = 0;
  for (size_t i = 0; i < exact.size(); i += 2) {
    const double off = std::abs(double{RowValue(&rows[i])} - double{RowValue(&exact[i])});
    error.largest = std::max(error.largest, off);
    sum += off;
  }
  error.mean = sum / (static_cast<double>(exact.size()) / 2);
  return error;
}

}  // namespace kvtide::testing
