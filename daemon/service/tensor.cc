#include "daemon/service/tensor.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/finite.h"
#include "kernels/base/float16.h"
#include "kernels/base/status.h"
#include "proto/data_type.h"

namespace kvtide::service {
namespace {

std::string ShapeText(const v1::Tensor& tensor) {
  return absl::StrCat("[", absl::StrJoin(tensor.shape(), ", "), "]");
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
  const size_t i = FirstBeyond(tensor.view, tensor.elements, kMaxF32);
  if (i == tensor.elements) return absl::OkStatus();
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
