// One launch for the coded pages and the f16 pages of a call: a sequence has both, and one form after the
// other would take two ways to a first page. Every CTA reads pages of one form, with that form's kernel body,
// queries and partial states; the plan says how many CTAs each form gets (ExactCtas) and a worker's entry,
// which it loads anyway, which form it is. The f16 body may have fewer warps than the CTA, as registers and
// shared memory are those of the coded kernel; the others are idle.
#pragma once

#include "kernels/cuda/attend/attend_kernel.cuh"

namespace kvtide::cuda {

template <class CodedConfig, class ExactConfig>
struct JointConfig {
  static_assert(CodedConfig::kThreads == ExactConfig::kCtaThreads &&
                CodedConfig::kRows == ExactConfig::kRows);
  static constexpr int kThreads = CodedConfig::kThreads;
  static constexpr int kSharedBytes = CodedConfig::kSharedBytes > ExactConfig::kSharedBytes
                                          ? CodedConfig::kSharedBytes
                                          : ExactConfig::kSharedBytes;
  using CodedQuery = typename CodedConfig::Info::Query;
  using ExactQuery = typename ExactConfig::Info::Query;
};

template <class CodedConfig, class Coded, class ExactConfig, class Exact>
__global__ void __launch_bounds__(CodedConfig::kThreads, 1)
    JointKernelFunction(const __grid_constant__ JointParams params) {
  using Config = JointConfig<CodedConfig, ExactConfig>;
  if (Config::kSharedBytes > SharedLimitOf(kThisCapability)) return;  // there is another one for this GPU
  LetNextKernelStart();
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const AttendWorker worker = params.workers[blockIdx.x * CodedConfig::kWarps + warp];
  if (worker.exact == 0) {
    AttendBody<CodedConfig, Coded>(params.coded, worker, worker.cta);
  } else if (warp < ExactConfig::kWarps) {
    AttendBody<ExactConfig, Exact>(params.exact, worker, worker.cta);
  }
}

// The queries of both: CTAs of coded units, then of f16 units.
template <class CodedQuery, class ExactQuery>
__global__ void __launch_bounds__(32 * CodedQuery::kRows, 1024 / (32 * CodedQuery::kRows))
    JointQueryKernel(const __grid_constant__ JointParams params) {
  static_assert(CodedQuery::kRows == ExactQuery::kRows);
  __shared__ __align__(128)
      uint8_t shared[CodedQuery::kBytes > ExactQuery::kBytes ? CodedQuery::kBytes : ExactQuery::kBytes];
  LetNextKernelStart();
  if (blockIdx.x < params.coded_units) {
    QueryBody<CodedQuery>(params.coded, blockIdx.x, shared);
  } else {
    QueryBody<ExactQuery>(params.exact, blockIdx.x - params.coded_units, shared);
  }
}

}  // namespace kvtide::cuda
