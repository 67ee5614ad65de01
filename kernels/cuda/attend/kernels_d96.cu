#include "kernels/cuda/attend/instantiate.cuh"

namespace kvtide::cuda {

void AddKernels96(std::vector<AttendKernel>* list) { AddCommonPairs<96>(list); }

}  // namespace kvtide::cuda
