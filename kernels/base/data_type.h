// The element types of tensors at the border (what engines send and receive), and a view of such a tensor.
// Not to be confused with cache types, which are storage formats of K and V.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/float16.h"

namespace kvtide {

enum class DataType : uint8_t { kF32, kF16, kBf16 };

constexpr size_t DataTypeBytes(DataType type) { return type == DataType::kF32 ? 4 : 2; }
constexpr const char* DataTypeName(DataType type) {
  return type == DataType::kF32 ? "f32" : type == DataType::kF16 ? "f16" : "bf16";
}

// Borrowed, dense, row-major elements; the shape is said by whoever takes one.
struct TensorView {
  const void* data = nullptr;
  DataType type = DataType::kF32;

  float At(size_t i) const {
    if (type == DataType::kF32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return type == DataType::kF16 ? F16ToF32(bits) : Bf16ToF32(bits);
  }
};

// The same, to be written. Memory of floats is such a view by itself.
struct MutableTensorView {
  void* data = nullptr;
  DataType type = DataType::kF32;

  MutableTensorView() = default;
  MutableTensorView(void* elements, DataType of_type) : data(elements), type(of_type) {}
  MutableTensorView(float* elements) : data(elements) {}  // NOLINT: implicit on purpose

  void Set(size_t i, float value) const {
    if (type == DataType::kF32) {
      static_cast<float*>(data)[i] = value;
    } else {
      static_cast<uint16_t*>(data)[i] = type == DataType::kF16 ? F32ToF16(value) : F32ToBf16(value);
    }
  }
};

}  // namespace kvtide
