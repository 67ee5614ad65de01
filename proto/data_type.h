// Element types of tensors between kvtide::DataType and the enum of the API, for both ends of the wire.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/data_type.h"
#include "kvtide/v1/tensor.pb.h"

namespace kvtide {

inline v1::DataType DataTypeToProto(DataType type) {
  switch (type) {
    case DataType::kF32:
      return v1::DATA_TYPE_F32;
    case DataType::kF16:
      return v1::DATA_TYPE_F16;
    case DataType::kBf16:
      return v1::DATA_TYPE_BF16;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

// INVALID_ARGUMENT when it is not set or unknown.
inline absl::StatusOr<DataType> DataTypeFromProto(v1::DataType type) {
  switch (type) {
    case v1::DATA_TYPE_F32:
      return DataType::kF32;
    case v1::DATA_TYPE_F16:
      return DataType::kF16;
    case v1::DATA_TYPE_BF16:
      return DataType::kBf16;
    case v1::DATA_TYPE_UNSPECIFIED:
      return absl::InvalidArgumentError("dtype is not set; known: f32, f16, bf16");
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("unknown dtype ", static_cast<int>(type), "; known: f32, f16, bf16"));
  }
}

}  // namespace kvtide
