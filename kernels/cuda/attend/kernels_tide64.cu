#include "kernels/cuda/attend/instantiate_tide.cuh"

namespace kvtide::cuda {

void AddTideKernels64(std::vector<AttendKernel>* list) { AddTidePairs<64>(list); }

}  // namespace kvtide::cuda
