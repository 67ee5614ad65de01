#include "daemon/cache/call/tensor_check.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/base/finite.h"
#include "kernels/base/sizes.h"

namespace kvtide {
namespace {

absl::Status Check(const TensorView& tensor, int64_t tokens, int heads, int dim, const char* what, int layer,
                   int64_t position, bool within_f16) {
  const size_t count = static_cast<size_t>(tokens) * static_cast<size_t>(heads) * static_cast<size_t>(dim);
  const size_t bad = FirstBeyond(tensor, count, within_f16 ? kMaxF16 : kMaxF32);
  if (bad == count) return absl::OkStatus();
  const float value = tensor.At(bad);
  const size_t row = static_cast<size_t>(heads) * static_cast<size_t>(dim);
  return absl::InvalidArgumentError(absl::StrCat(
      what, " has ",
      std::isnan(value)   ? "NaN"
      : std::isinf(value) ? "an infinity"
                          : absl::StrCat(value),
      " at layer ", layer, ", token ", SaturatingAdd(position, static_cast<int64_t>(bad / row)), ", head ",
      bad % row / static_cast<size_t>(dim), ", index ", bad % static_cast<size_t>(dim),
      within_f16 ? ": values must be finite and within +-65504" : ": values must be finite"));
}

}  // namespace

absl::Status CheckPosition(int64_t position, const char* what) {
  if (position >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, " ", position, " is negative"));
}

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
