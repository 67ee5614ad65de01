// Tensors of the API: checked views of what came in, and results that are computed straight into the answer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/base/data_type.h"
#include "kvtide/v1/tensor.pb.h"

namespace kvtide::service {

// A [tokens][heads][dim] tensor that arrived, borrowed from its message.
struct IncomingTensor {
  TensorView view;
  int64_t tokens = 0;
  size_t elements = 0;
};

// InvalidArgument that begins with `name` if dtype, shape or bytes are not those of [tokens][heads][dim] with
// tokens >= 1.
absl::StatusOr<IncomingTensor> CheckTensor(const v1::Tensor& tensor, const std::string& name, int heads,
                                           int dim);

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
