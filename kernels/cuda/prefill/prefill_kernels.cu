#include "kernels/cuda/prefill/prefill_kernel.cuh"
#include "kernels/cuda/prefill/prefill_overlap.cuh"

namespace kvtide::cuda {
namespace {

template <int D, class Config>
PrefillKernel Entry(bool warpgroups, const void* attend) {
  return {D,
          warpgroups,
          Config::kQueryRows,
          Config::kPages,
          Config::kThreads,
          Config::kSharedBytes,
          Config::kCtas,
          attend,
          reinterpret_cast<const void*>(&PrefillMergeFunction<D>)};
}
template <int D>
void Add(std::vector<PrefillKernel>* list) {
  using Plain = PrefillConfig<D>;
  using Overlap = OverlapConfig<D>;
  list->push_back(Entry<D, Plain>(false, reinterpret_cast<const void*>(&PrefillKernelFunction<Plain, D>)));
  list->push_back(Entry<D, Overlap>(true, reinterpret_cast<const void*>(&OverlapKernelFunction<Overlap, D>)));
}

}  // namespace

const std::vector<PrefillKernel>& AllPrefillKernels() {
  static const auto* const list = [] {
    auto* const kernels = new std::vector<PrefillKernel>;
    Add<64>(kernels);
    Add<128>(kernels);
    Add<192>(kernels);
    Add<256>(kernels);
    return kernels;
  }();
  return *list;
}

const PrefillKernel* FindPrefillKernel(int dim, bool warpgroups) {
  for (const PrefillKernel& kernel : AllPrefillKernels())
    if (kernel.dim >= dim && kernel.warpgroups == warpgroups) return &kernel;
  return nullptr;
}

}  // namespace kvtide::cuda
