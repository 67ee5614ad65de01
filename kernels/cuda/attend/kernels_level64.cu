#include "kernels/cuda/attend/instantiate_level.cuh"

namespace kvtide::cuda {

void AddLevelKernels64(std::vector<AttendKernel>* list) { AddLevelPairs<64>(list); }

}  // namespace kvtide::cuda
