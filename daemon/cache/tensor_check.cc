#include "daemon/cache/tensor_check.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace kvtide {
namespace {

// All magnitudes of a type order like their bit patterns, so the largest pattern of a stretch decides; the
// loop vectorises.
template <class T>
T LargestMagnitude(const T* bits, size_t count, T mask) {
  T largest = 0;
  for (size_t i = 0; i < count; i++) largest = std::max(largest, static_cast<T>(bits[i] & mask));
  return largest;
}

template <class T>
size_t FirstBeyond(const void* data, size_t count, T mask, T limit) {
  constexpr size_t kStretch = 4096;
  const T* bits = static_cast<const T*>(data);
  for (size_t begin = 0; begin < count; begin += kStretch) {
    const size_t n = std::min(kStretch, count - begin);
    if (LargestMagnitude(bits + begin, n, mask) <= limit) continue;
    for (size_t i = begin; i < begin + n; i++)
      if ((bits[i] & mask) > limit) return i;
  }
  return count;
}

absl::Status Check(const TensorView& tensor, int64_t tokens, int heads, int dim, const char* what, int layer,
                   int64_t position, bool within_f16) {
  const size_t count = static_cast<size_t>(tokens) * static_cast<size_t>(heads) * static_cast<size_t>(dim);
  size_t bad = count;
  switch (tensor.type) {
    case DataType::kF32:
      bad = FirstBeyond<uint32_t>(tensor.data, count, 0x7fffffffu,
                                  within_f16 ? FloatBits(kMaxF16) : 0x7f7fffffu);
      break;
    case DataType::kF16:
      bad = FirstBeyond<uint16_t>(tensor.data, count, 0x7fffu, 0x7bffu);
      break;
    case DataType::kBf16:  // 65280 is the largest bfloat16 within f16
      bad = FirstBeyond<uint16_t>(tensor.data, count, 0x7fffu,
                                  within_f16 ? uint16_t{0x477f} : uint16_t{0x7f7f});
      break;
  }
  if (bad == count) return absl::OkStatus();
  const float value = tensor.At(bad);
  const size_t row = static_cast<size_t>(heads) * static_cast<size_t>(dim);
  return absl::InvalidArgumentError(
      absl::StrCat(what, " has ",
                   std::isnan(value)   ? "NaN"
                   : std::isinf(value) ? "an infinity"
                                       : absl::StrCat(value),
                   " at layer ", layer, ", token ", position + static_cast<int64_t>(bad / row), ", head ",
                   bad % row / static_cast<size_t>(dim), ", index ", bad % static_cast<size_t>(dim),
                   within_f16 ? ": values must be finite and within +-65504" : ": values must be finite"));
}

}  // namespace

absl::Status CheckElements(size_t elements, int64_t tokens, int heads, int dim, const char* what, int layer) {
  const size_t expected = static_cast<size_t>(tokens) * static_cast<size_t>(heads) * static_cast<size_t>(dim);
  if (elements == 0 || elements == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, " of layer ", layer, " has ", elements,
                                                 " values, needs [", tokens, "][", heads, "][", dim,
                                                 "] = ", expected));
}

absl::Status CheckValues(const TensorView& tensor, int64_t tokens, int heads, int dim, const char* what,
                         int layer, int64_t position) {
  return Check(tensor, tokens, heads, dim, what, layer, position, true);
}

absl::Status CheckFinite(const TensorView& tensor, int64_t tokens, int heads, int dim, const char* what,
                         int layer, int64_t position) {
  return Check(tensor, tokens, heads, dim, what, layer, position, false);
}

}  // namespace kvtide
