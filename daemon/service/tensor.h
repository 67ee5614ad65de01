// Tensors of the API: checked views of what came in, and results that are computed straight into the answer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/base/data_type.h"
#include "kvtide/v1/tensor.pb.h"

namespace kvtide::service {

// Memory that a caller sees too, in which tensors may lie instead of in its messages. The caller may change
// what lies there at any time; that changes values, never sizes.
class TensorMemory {
 public:
  // Borrowed. Places are offsets from `base`, at multiples of `alignment`.
  TensorMemory(std::byte* base, uint64_t bytes, uint64_t alignment = 16)
      : base_(base), bytes_(bytes), alignment_(alignment) {}
  // All memory of this process: places are addresses.
  static TensorMemory OfProcess() { return {nullptr, ~uint64_t{0}, 1}; }

  std::byte* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }

  // Where `bytes` bytes lie, or InvalidArgument that begins with `name`; `memory` may be null.
  static absl::StatusOr<std::byte*> Find(const TensorMemory* memory, const v1::Place& place, uint64_t bytes,
                                         const std::string& name);

 private:
  std::byte* base_;
  uint64_t bytes_, alignment_;
};

// A [tokens][heads][dim] tensor that arrived, borrowed from its message or its place.
struct IncomingTensor {
  TensorView view;
  int64_t tokens = 0;
  size_t elements = 0;
};

// InvalidArgument that begins with `name` if dtype, shape or bytes are not those of [tokens][heads][dim] with
// tokens >= 1.
absl::StatusOr<IncomingTensor> CheckTensor(const v1::Tensor& tensor, const std::string& name, int heads,
                                           int dim, const TensorMemory* memory);

// InvalidArgument with token, head and index of the first value that is NaN or infinite.
absl::Status CheckFinite(const IncomingTensor& tensor, const std::string& name, int heads, int dim);

// Memory for a result in the type in which it is sent, inside the message.
class OutgoingTensor {
 public:
  // Borrows `proto`.
  OutgoingTensor(v1::Tensor* proto, DataType type, const std::vector<int64_t>& shape);
  // Where the elements go; valid while the message stays as it is.
  MutableTensorView view() const { return view_; }

 private:
  MutableTensorView view_;
};

}  // namespace kvtide::service
