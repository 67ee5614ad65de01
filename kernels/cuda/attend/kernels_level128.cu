#include "kernels/cuda/attend/instantiate_level.cuh"

namespace kvtide::cuda {

void AddLevelKernels128(std::vector<AttendKernel>* list) { AddLevelPairs<128>(list); }

}  // namespace kvtide::cuda
