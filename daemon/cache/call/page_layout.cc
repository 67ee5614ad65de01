#include "daemon/cache/call/page_layout.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/sizes.h"

namespace kvtide {
namespace {

// Sums of products that stay below 2^62, or nothing.
class Sum {
 public:
  Sum& Add(int64_t a, int64_t b = 1) {
    const std::optional<int64_t> product = CheckedMul<int64_t>(a, b);
    if (value_.has_value())
      value_ = product.has_value() ? CheckedAdd<int64_t>(*value_, *product) : std::nullopt;
    if (value_.has_value() && *value_ > int64_t{1} << 62) value_.reset();
    return *this;
  }
  std::optional<int64_t> value() const { return value_; }

 private:
  std::optional<int64_t> value_ = 0;
};

}  // namespace

absl::StatusOr<ResolvedPages> ResolvedPages::Make(const PageLayout& layout, const PageShape& shape,
                                                  int64_t blocks) {
  const std::pair<int64_t, const char*> strides[] = {
      {layout.block_stride, "block_stride"},     {layout.layer_stride, "layer_stride"},
      {layout.value_offset, "value_offset"},     {layout.token_stride_k, "token_stride_k"},
      {layout.token_stride_v, "token_stride_v"}, {layout.head_stride_k, "head_stride_k"},
      {layout.head_stride_v, "head_stride_v"}};
  for (const auto& [stride, name] : strides)
    if (stride < 0) return absl::InvalidArgumentError(absl::StrCat(name, " ", stride, " is negative"));
  const auto too_large = [] {
    return absl::InvalidArgumentError("the strides of the pages span more than 2^62 elements");
  };
  ResolvedPages pages;
  pages.layout_ = layout;
  std::optional<int64_t> page[2], last[2];
  for (const bool value : {false, true}) {
    Side& side = value ? pages.v_ : pages.k_;
    side.dim = value ? shape.head_dim_v : shape.head_dim_k;
    side.token_stride = value ? layout.token_stride_v : layout.token_stride_k;
    side.head_stride = value ? layout.head_stride_v : layout.head_stride_k;
    const bool by_token = layout.order == PageOrder::kNhd;
    int64_t& inner = by_token ? side.head_stride : side.token_stride;
    int64_t& outer = by_token ? side.token_stride : side.head_stride;
    const int64_t inner_count = by_token ? shape.kv_heads : shape.tokens;
    const int64_t outer_count = by_token ? shape.tokens : shape.kv_heads;
    if (inner == 0) inner = side.dim;
    const std::optional<int64_t> dense = Sum().Add(inner, inner_count).value();
    if (outer == 0 && !dense.has_value()) return too_large();
    if (outer == 0) outer = *dense;
    page[value ? 1 : 0] = Sum().Add(outer, outer_count).value();
    last[value ? 1 : 0] = Sum()
                              .Add(side.token_stride, shape.tokens - 1)
                              .Add(side.head_stride, shape.kv_heads - 1)
                              .Add(side.dim)
                              .value();
    side.dense = side.head_stride == side.dim && side.token_stride == int64_t{shape.kv_heads} * side.dim;
  }
  if (!page[0].has_value() || !page[1].has_value() || !last[0].has_value() || !last[1].has_value())
    return too_large();
  PageLayout& to = pages.layout_;
  if (to.value_offset == 0) to.value_offset = *page[0];
  pages.v_.offset = to.value_offset;
  const std::optional<int64_t> layer = Sum().Add(to.value_offset).Add(*page[1]).value();
  if (to.layer_stride == 0 && !layer.has_value()) return too_large();
  if (to.layer_stride == 0) to.layer_stride = *layer;
  const std::optional<int64_t> block = Sum().Add(to.layer_stride, shape.layers).value();
  if (to.block_stride == 0 && !block.has_value()) return too_large();
  if (to.block_stride == 0) to.block_stride = *block;
  if (blocks <= 0) return pages;
  const std::optional<int64_t> value_end = Sum().Add(to.value_offset).Add(*last[1]).value();
  if (!value_end.has_value()) return too_large();
  const std::optional<int64_t> elements = Sum()
                                              .Add(to.block_stride, blocks - 1)
                                              .Add(to.layer_stride, shape.layers - 1)
                                              .Add(std::max(*last[0], *value_end))
                                              .value();
  if (!elements.has_value()) return too_large();
  pages.elements_ = *elements;
  return pages;
}

}  // namespace kvtide
