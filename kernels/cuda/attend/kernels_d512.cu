#include "kernels/cuda/attend/instantiate.cuh"

namespace kvtide::cuda {

void AddKernels512(std::vector<AttendKernel>* list) { AddCommonPairs<512>(list); }

}  // namespace kvtide::cuda
