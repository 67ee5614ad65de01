// A weight as a model file holds it: plain floats, or a quantised GGUF type that is decoded row by row. It
// borrows its bytes from the reader that gave it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "clients/engine/gguf_blocks.h"
#include "kernels/base/data_type.h"

namespace kvtide::engine {

struct WeightTensor {
  std::optional<DataType> type;  // f32, f16, bf16
  std::string type_name;         // as the file says, for messages
  std::vector<int64_t> shape;    // [rows][values of a row], or [values]
  std::span<const std::byte> bytes;
  std::optional<GgufType> coded;  // else; neither: a type that the engine does not compute with
  // Rows lie in the order of neighbouring RoPE pairs, as GGUF files of Llama models have them: this many
  // heads have to be put in order; 0 = none.
  int paired_heads = 0;

  bool readable() const { return type.has_value() || coded.has_value(); }
  int64_t row_values() const { return shape.empty() ? 1 : shape.back(); }
  int64_t rows() const { return shape.size() < 2 ? 1 : shape[0]; }

  // Rows [first, first + count) of a matrix; not of one whose rows are out of order.
  WeightTensor Rows(int64_t first, int64_t count) const {
    WeightTensor part = *this;
    const size_t row_bytes = bytes.size() / static_cast<size_t>(rows());
    part.shape = {count, row_values()};
    part.bytes =
        bytes.subspan(static_cast<size_t>(first) * row_bytes, static_cast<size_t>(count) * row_bytes);
    return part;
  }

  // One row as f32.
  void Row(int64_t row, float* to) const {
    const auto n = static_cast<size_t>(row_values());
    const auto at = static_cast<size_t>(Place(row));
    if (coded.has_value()) {
      const GgufTypeInfo info = InfoOfGguf(static_cast<uint32_t>(*coded));
      const size_t row_bytes = n / static_cast<size_t>(info.group) * static_cast<size_t>(info.bytes);
      return DecodeGguf(*coded, bytes.data() + at * row_bytes, n, to);
    }
    const std::byte* from = bytes.data() + at * n * DataTypeBytes(*type);  // may be unaligned
    if (*type == DataType::kF32) {
      std::memcpy(to, from, n * sizeof(float));
      return;
    }
    for (size_t i = 0; i < n; i++) {
      uint16_t bits;
      std::memcpy(&bits, from + 2 * i, 2);
      to[i] = *type == DataType::kF16 ? F16ToF32(bits) : Bf16ToF32(bits);
    }
  }

  // Where row `row` of the half-split order lies: value i of the first half of a head is the pair's first.
  int64_t Place(int64_t row) const {
    if (paired_heads == 0) return row;
    const int64_t dim = rows() / paired_heads, in_head = row % dim;
    return row - in_head + (in_head < dim / 2 ? 2 * in_head : 2 * (in_head - dim / 2) + 1);
  }
};

}  // namespace kvtide::engine
