#include "kernels/cuda/attend/instantiate.cuh"

namespace kvtide::cuda {

void AddKernels192(std::vector<AttendKernel>* list) { AddCommonPairs<192>(list); }

}  // namespace kvtide::cuda
