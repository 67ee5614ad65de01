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

OutgoingTensor::OutgoingTensor(v1::Tensor* proto, DataType type, const std::vector<int64_t>& shape) {
  size_t elements = 1;
  for (int64_t dimension : shape) {
    elements *= static_cast<size_t>(dimension);
    proto->add_shape(dimension);
  }
  proto->set_dtype(DataTypeToProto(type));
  proto->mutable_data()->resize(elements * DataTypeBytes(type));
  // Heap memory of a string is aligned for any type; its short form is at a multiple of 8.
  view_ = {proto->mutable_data()->data(), type};
}

}  // namespace kvtide::service
