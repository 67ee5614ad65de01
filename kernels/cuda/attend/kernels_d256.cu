#include "kernels/cuda/attend/instantiate.cuh"

namespace kvtide::cuda {

void AddKernels256(std::vector<AttendKernel>* list) { AddCommonPairs<256>(list); }

}  // namespace kvtide::cuda
