#include "daemon/service/tensor.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/check.h"
#include "kernels/base/float16.h"
#include "kernels/base/status.h"
#include "proto/data_type.h"

namespace kvtide::service {
namespace {

std::string ShapeText(const v1::Tensor& tensor) {
  return absl::StrCat("[", absl::StrJoin(tensor.shape(), ", "), "]");
}

// True if any value has all exponent bits set: NaN or infinite. Written so that compilers make vector code of
// it.
template <class Bits>
bool AnyNotFinite(const void* data, size_t elements, Bits exponent) {
  const Bits* values = static_cast<const Bits*>(data);
  unsigned found = 0;
  for (size_t i = 0; i < elements; i++) found |= static_cast<unsigned>((values[i] & exponent) == exponent);
  return found != 0;
}

}  // namespace

absl::StatusOr<IncomingTensor> CheckTensor(const v1::Tensor& tensor, const std::string& name, int heads,
                                           int dim) {
  auto type = DataTypeFromProto(tensor.dtype());
  if (!type.ok()) return Annotate(type.status(), name);
  if (tensor.shape_size() != 3 || tensor.shape(0) < 1 || tensor.shape(1) != heads || tensor.shape(2) != dim) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": the shape is ", ShapeText(tensor),
                                                   ", expected [tokens, ", heads, ", ", dim,
                                                   "] with at least one token"));
  }
  const size_t row_bytes = static_cast<size_t>(heads) * static_cast<size_t>(dim) * DataTypeBytes(*type);
  // Divided, not multiplied: the first dimension may be any number.
  if (tensor.data().size() % row_bytes != 0 ||
      static_cast<int64_t>(tensor.data().size() / row_bytes) != tensor.shape(0)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": data has ", tensor.data().size(), " bytes, but ",
                                                   DataTypeName(*type), " of shape ", ShapeText(tensor),
                                                   " has ", tensor.shape(0), " x ", row_bytes));
  }
  IncomingTensor incoming;
  incoming.view = {tensor.data().data(), *type};
  incoming.tokens = tensor.shape(0);
  incoming.elements = tensor.data().size() / DataTypeBytes(*type);
  return incoming;
}

absl::Status CheckFinite(const IncomingTensor& tensor, const std::string& name, int heads, int dim) {
  bool bad = false;
  switch (tensor.view.type) {
    case DataType::kF32:
      bad = AnyNotFinite<uint32_t>(tensor.view.data, tensor.elements, 0x7f800000u);
      break;
    case DataType::kF16:
      bad = AnyNotFinite<uint16_t>(tensor.view.data, tensor.elements, 0x7c00u);
      break;
    case DataType::kBf16:
      bad = AnyNotFinite<uint16_t>(tensor.view.data, tensor.elements, 0x7f80u);
      break;
  }
  if (!bad) return absl::OkStatus();
  size_t i = 0;
  while (i < tensor.elements && std::isfinite(tensor.view.At(i))) i++;
  KVTIDE_CHECK(i < tensor.elements);
  const size_t row = static_cast<size_t>(heads) * static_cast<size_t>(dim), d = static_cast<size_t>(dim);
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": ", std::isnan(tensor.view.At(i)) ? "NaN" : "infinity", " at token ", i / row,
                   ", head ", i % row / d, ", index ", i % d));
}

OutgoingTensor::OutgoingTensor(v1::Tensor* proto, DataType type, std::vector<int64_t> shape)
    : proto_(proto), type_(type), elements_(1) {
  for (int64_t dimension : shape) {
    elements_ *= static_cast<size_t>(dimension);
    proto_->add_shape(dimension);
  }
  proto_->set_dtype(DataTypeToProto(type));
  proto_->mutable_data()->resize(elements_ * DataTypeBytes(type));
  if (type != DataType::kF32) wide_.resize(elements_);
}

float* OutgoingTensor::data() {
  if (type_ != DataType::kF32) return wide_.data();
  // Heap memory of a string is aligned for any type; its short form is at a multiple of 8.
  return reinterpret_cast<float*>(proto_->mutable_data()->data());
}

void OutgoingTensor::Finish() {
  if (type_ == DataType::kF32) return;
  auto* out = reinterpret_cast<uint16_t*>(proto_->mutable_data()->data());
  for (size_t i = 0; i < elements_; i++)
    out[i] = type_ == DataType::kF16 ? F32ToF16(wide_[i]) : F32ToBf16(wide_[i]);
}

}  // namespace kvtide::service
