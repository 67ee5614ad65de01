// The merge of combine_kernel.cuh for results that go to places of their own.
#pragma once

#include "kernels/cuda/attend/attend_plan.h"

namespace kvtide::cuda {

struct ScatterParams {
  CombineParams combine;
  void* const* output_rows = nullptr;  // where each query token's output begins, tokens as in log-sum-exps
};

// As FindCombineKernel (kernel_list.h): the same sums in the same order. The kernel takes ScatterParams of
// groups whose output_stride is that of all heads.
const void* FindScatterCombineKernel(int dv, int team);

}  // namespace kvtide::cuda
