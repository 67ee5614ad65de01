// How K and V of blocks lie in the memory of an engine that keeps pages of its own: one buffer for all blocks
// of a call, described by strides. A page is K or V of one layer of one block; a row is one token and head,
// whose values lie side by side.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/base/data_type.h"

namespace kvtide {

enum class PageOrder : uint8_t { kNhd, kHnd };  // [tokens][heads][dim] or [heads][tokens][dim]

// In elements of `type`. A stride of 0 is that of a dense buffer [blocks][layers][K page, V page], or what
// follows from the strides inside of it.
struct PageLayout {
  DataType type = DataType::kF16;
  PageOrder order = PageOrder::kNhd;
  int64_t block_stride = 0;  // from one block to the next
  int64_t layer_stride = 0;
  int64_t value_offset = 0;  // from the first value of K to that of V of the same layer and block
  int64_t token_stride_k = 0, token_stride_v = 0;
  int64_t head_stride_k = 0, head_stride_v = 0;
};

// What a block holds.
struct PageShape {
  int layers = 0;
  int tokens = 0;  // of a block
  int kv_heads = 0;
  int head_dim_k = 0, head_dim_v = 0;
  bool operator==(const PageShape&) const = default;
};

// A layout with every stride, and what it spans.
class ResolvedPages {
 public:
  // InvalidArgument for a negative stride, and where the blocks span more than 2^62 elements.
  static absl::StatusOr<ResolvedPages> Make(const PageLayout& layout, const PageShape& shape, int64_t blocks);

  // One side of the pages.
  struct Side {
    int64_t offset = 0;  // of V after K
    int64_t token_stride = 0, head_stride = 0;
    int dim = 0;
    // Rows of all heads of consecutive tokens are one dense piece [tokens][heads][dim].
    bool dense = false;
  };
  const Side& k() const { return k_; }
  const Side& v() const { return v_; }
  DataType type() const { return layout_.type; }
  // Elements, up to one beyond the last that is named; 0 without blocks.
  int64_t elements() const { return elements_; }
  uint64_t bytes() const { return static_cast<uint64_t>(elements_) * DataTypeBytes(layout_.type); }
  // Index of the first value of a row.
  int64_t At(const Side& side, int64_t block, int layer, int token, int head) const {
    return block * layout_.block_stride + layer * layout_.layer_stride + side.offset +
           token * side.token_stride + head * side.head_stride;
  }

 private:
  PageLayout layout_;
  Side k_, v_;
  int64_t elements_ = 0;
};

}  // namespace kvtide
