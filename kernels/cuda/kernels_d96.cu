#include "kernels/cuda/instantiate.cuh"

namespace kvtide::cuda {

void AddKernels96(std::vector<AttendKernel>* list) { AddCommonPairs<96>(list); }

}  // namespace kvtide::cuda
