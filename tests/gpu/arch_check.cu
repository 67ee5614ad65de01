// Compiled, never run: one kernel of each kind for every generation of GPUs that the backend supports, so
// that code for those that nobody builds every day keeps compiling. The target kvtide_cuda_archs.
#include "kernels/cuda/attend/combine_kernel.cuh"
#include "kernels/cuda/attend/instantiate.cuh"
#include "kernels/cuda/prefill/prefill_kernel.cuh"
#include "kernels/cuda/prefill/prefill_overlap.cuh"

namespace kvtide::cuda {

std::vector<AttendKernel> KernelsOfEveryArchitecture() {
  std::vector<AttendKernel> list;
  AddCodedTile<Turbo4, Turbo4, 64, 1>(&list);
  AddHalfTile<false, 64, 1>(&list);
  return list;
}
const void* MergeOfEveryArchitecture() { return reinterpret_cast<const void*>(&CombineKernel<64, true>); }
const void* PrefillOfEveryArchitecture() {
  return reinterpret_cast<const void*>(&PrefillKernelFunction<PrefillConfig<64>, 64>);
}
const void* OverlapOfEveryArchitecture() {
  return reinterpret_cast<const void*>(&OverlapKernelFunction<OverlapConfig<64>, 64>);
}

}  // namespace kvtide::cuda
