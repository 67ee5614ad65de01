#include "kernels/cuda/attend/instantiate.cuh"

namespace kvtide::cuda {

void AddKernels64(std::vector<AttendKernel>* list) { AddCommonPairs<64>(list); }

}  // namespace kvtide::cuda
