// Matrix products on panels. A panel is 32 columns of a right-hand matrix, stored row after row ([k][32]) as
// f32, f16 or bf16, so that one vector load gives neighbouring outputs; weights, keys and values are all kept
// this way. Vectorised for the CPU that runs it (AVX-512, AVX2, SSE4); sums are f32. Pure functions, any
// thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "clients/engine/weight_tensor.h"
#include "kernels/base/data_type.h"
#include "kernels/base/thread_pool.h"

namespace kvtide::engine {

constexpr int kPanelWidth = 32;

// c[r][0 .. 32) = a[r][0 .. k) x panel, or added to c when `accumulate`. Strides in floats.
void MultiplyPanel(const float* a, size_t a_stride, int rows, const void* panel, DataType type, int k,
                   float* c, size_t c_stride, bool accumulate);

// A weight matrix [outputs][inputs] repacked into panels of 32 outputs (the last one padded with zeros), in
// the element type of the file.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  // In the tensor's type, or f32 if it is coded or its rows are out of order.
  explicit PackedMatrix(const WeightTensor& weights);
  // `weights` is row-major [outputs][inputs]; it may be unaligned.
  PackedMatrix(const void* weights, DataType type, int outputs, int inputs);

  int outputs() const { return outputs_; }
  int inputs() const { return inputs_; }

  // y[i][o] = sum over k of x[i][k] * w[o][k] (+ bias[o] unless null), for `rows` rows; x and y are dense.
  void Multiply(ThreadPool& pool, const float* x, int rows, const float* bias, float* y) const;

 private:
  const void* Panel(int index) const;

  DataType type_ = DataType::kF32;
  int outputs_ = 0;
  int inputs_ = 0;
  std::vector<uint32_t> storage_;  // 4-byte units, whatever the type
};

}  // namespace kvtide::engine
