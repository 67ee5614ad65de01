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

absl::StatusOr<std::byte*> TensorMemory::Find(const TensorMemory* memory, const v1::Place& place,
                                              uint64_t bytes, const std::string& name) {
  if (memory == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": it names a place, but this way shares no memory"));
  }
  if (place.bytes() != bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": the place has ", place.bytes(), " bytes, the tensor ", bytes));
  }
  // Compared by what is left, so that nothing overflows.
  const uint64_t offset = place.offset();
  if (offset % memory->alignment_ != 0 || offset > memory->bytes_ || bytes > memory->bytes_ - offset) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", bytes, " bytes at ", offset,
                                                   " are not inside the arena of ", memory->bytes_,
                                                   ", or not at a multiple of ", memory->alignment_));
  }
  return reinterpret_cast<std::byte*>(reinterpret_cast<uintptr_t>(memory->base_) + offset);
}

absl::StatusOr<IncomingTensor> CheckTensor(const v1::Tensor& tensor, const std::string& name, int heads,
                                           int dim, const TensorMemory* memory) {
  auto type = DataTypeFromProto(tensor.dtype());
  if (!type.ok()) return Annotate(type.status(), name);
  if (tensor.shape_size() != 3 || tensor.shape(0) < 1 || tensor.shape(1) != heads || tensor.shape(2) != dim) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": the shape is ", ShapeText(tensor),
                                                   ", expected [tokens, ", heads, ", ", dim,
                                                   "] with at least one token"));
  }
  const size_t row_bytes = static_cast<size_t>(heads) * static_cast<size_t>(dim) * DataTypeBytes(*type);
  IncomingTensor incoming;
  incoming.tokens = tensor.shape(0);
  if (tensor.has_place()) {
    constexpr int64_t kMostTokens = int64_t{1} << 40;
    if (!tensor.data().empty() || tensor.shape(0) > kMostTokens) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": it has data and a place, or ", tensor.shape(0), " tokens"));
    }
    const uint64_t bytes = static_cast<uint64_t>(tensor.shape(0)) * row_bytes;
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const at, TensorMemory::Find(memory, tensor.place(), bytes, name));
    incoming.view = {at, *type};
    incoming.elements = bytes / DataTypeBytes(*type);
    return incoming;
  }
  // Divided, not multiplied: the first dimension may be any number.
  if (tensor.data().size() % row_bytes != 0 ||
      static_cast<int64_t>(tensor.data().size() / row_bytes) != tensor.shape(0)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": data has ", tensor.data().size(), " bytes, but ",
                                                   DataTypeName(*type), " of shape ", ShapeText(tensor),
                                                   " has ", tensor.shape(0), " x ", row_bytes));
  }
  incoming.view = {tensor.data().data(), *type};
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
