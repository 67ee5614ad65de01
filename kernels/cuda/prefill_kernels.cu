#include "kernels/cuda/prefill_kernel.cuh"

namespace kvtide::cuda {
namespace {

template <int D, bool kWarpgroups>
PrefillKernel Entry() {
  using Config = PrefillConfig<D, kWarpgroups>;
  return {D,
          kWarpgroups,
          Config::kQueryRows,
          Config::kThreads,
          Config::kSharedBytes,
          Config::kCtas,
          reinterpret_cast<const void*>(&PrefillKernelFunction<Config, D>),
          reinterpret_cast<const void*>(&PrefillMergeFunction<D>)};
}

}  // namespace

const std::vector<PrefillKernel>& AllPrefillKernels() {
  static const auto* const list = new std::vector<PrefillKernel>{
      Entry<64, true>(),  Entry<128, true>(),  Entry<192, true>(),  Entry<256, true>(),
      Entry<64, false>(), Entry<128, false>(), Entry<192, false>(), Entry<256, false>()};
  return *list;
}

const PrefillKernel* FindPrefillKernel(int dim, bool warpgroups) {
  for (const PrefillKernel& kernel : AllPrefillKernels())
    if (kernel.dim >= dim && kernel.warpgroups == warpgroups) return &kernel;
  return nullptr;
}

}  // namespace kvtide::cuda
