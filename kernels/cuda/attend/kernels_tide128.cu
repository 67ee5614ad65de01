#include "kernels/cuda/attend/instantiate_tide.cuh"

namespace kvtide::cuda {

void AddTideKernels128(std::vector<AttendKernel>* list) { AddTidePairs<128>(list); }

}  // namespace kvtide::cuda
