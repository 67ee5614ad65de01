// BlockLayout: the bytes of a block and the offset of everything in it. The planner's predictions, the pools
// and all kernels take their numbers from here.
//
// A block holds 64 tokens of all layers of one layer group: for each layer, for each KV head, one record
//     [K codes | K scales | V codes | V scales]
// of record_bytes, a multiple of 128 on either side. Scales are f16[groups][64], in token
// order; those of calibrated types (tide.h) are u8[64].
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/page_order.h"

namespace kvtide {

// Layers with the same KV heads, head dims and attention window.
struct GroupShape {
  int layers = 0;
  int kv_heads = 0;
  int head_dim_k = 0;
  int head_dim_v = 0;
  bool operator==(const GroupShape&) const = default;
};

// InvalidArgument if the shape is outside the limits: 1..1024 layers, 1..1024 heads, head dims 16..512,
// multiples of 16.
absl::Status CheckGroupShape(const GroupShape& shape);

// One side (K or V) of a record.
struct HalfLayout {
  int head_dim = 0, stored_dim = 0;
  int groups = 0;          // scales per token
  size_t code_bytes = 0;   // code plane, or the f16 rows
  size_t scale_bytes = 0;  // scale plane, filled up to a multiple of 128
  size_t bytes = 0;
};
HalfLayout MakeHalfLayout(CacheType type, int head_dim);

class BlockLayout {
 public:
  BlockLayout() = default;
  BlockLayout(const GroupShape& shape, CachePair pair);

  const GroupShape& shape() const { return shape_; }
  CachePair pair() const { return pair_; }
  const HalfLayout& k() const { return k_; }
  const HalfLayout& v() const { return v_; }
  size_t record_bytes() const { return k_.bytes + v_.bytes; }
  size_t block_bytes() const { return record_bytes() * static_cast<size_t>(shape_.layers * shape_.kv_heads); }
  // `layer` counts within the layer group.
  size_t RecordOffset(int layer, int kv_head) const {
    return record_bytes() *
           (static_cast<size_t>(layer) * static_cast<size_t>(shape_.kv_heads) + static_cast<size_t>(kv_head));
  }
  // Inside a record.
  size_t k_codes() const { return 0; }
  size_t k_scales() const { return k_.code_bytes; }
  size_t v_codes() const { return k_.bytes; }
  size_t v_scales() const { return k_.bytes + v_.code_bytes; }

  // Stored bits per value of the head dims (padding and scales included).
  double BitsPerValue() const;
  bool operator==(const BlockLayout& other) const { return shape_ == other.shape_ && pair_ == other.pair_; }

 private:
  GroupShape shape_;
  CachePair pair_;
  HalfLayout k_, v_;
};

}  // namespace kvtide
