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

// f32 memory for a result, inside the message where it is to be sent as f32. Finish converts to the other
// types.
class OutgoingTensor {
 public:
  // Borrows `proto` until Finish.
  OutgoingTensor(v1::Tensor* proto, DataType type, std::vector<int64_t> shape);
  float* data();
  void Finish();

 private:
  v1::Tensor* proto_;
  DataType type_;
  size_t elements_;
  std::vector<float> wide_;  // only for types other than f32
};

}  // namespace kvtide::service
