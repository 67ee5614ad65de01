// Arrays of the caller (buffer protocol or DLPack, host memory, dense and row-major) as borrowed views.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <span>
#include <string>

#include "absl/strings/str_cat.h"
#include "clients/cpp/client.h"
#include "clients/python/raise.h"

namespace kvtide::python {

using AnyArray = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;
using AnyWritableArray = nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>;
using Floats = nanobind::ndarray<float, nanobind::c_contig, nanobind::device::cpu>;
using ConstFloats = nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>;

// f32, f16 and bf16; 16-bit unsigned integers are the bits of bf16, which NumPy has no type for.
inline DataType ElementType(const nanobind::dlpack::dtype& type) {
  using Code = nanobind::dlpack::dtype_code;
  if (type.lanes == 1) {
    if (type.code == static_cast<uint8_t>(Code::Float) && type.bits == 32) return DataType::kF32;
    if (type.code == static_cast<uint8_t>(Code::Float) && type.bits == 16) return DataType::kF16;
    if (type.code == static_cast<uint8_t>(Code::Bfloat) && type.bits == 16) return DataType::kBf16;
    if (type.code == static_cast<uint8_t>(Code::UInt) && type.bits == 16) return DataType::kBf16;
  }
  throw StatusException(absl::InvalidArgumentError("the elements are neither f32 nor f16 nor bf16"));
}

inline client::TensorRef Ref(const AnyArray& array) {
  client::TensorRef ref{array.data(), ElementType(array.dtype()), {}};
  for (size_t i = 0; i < array.ndim(); i++) ref.shape.push_back(static_cast<int64_t>(array.shape(i)));
  return ref;
}

inline std::span<float> Span(const Floats& array) { return {array.data(), array.size()}; }

}  // namespace kvtide::python
