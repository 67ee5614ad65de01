#include "kernels/cuda/attend/attend_launch.h"

#include <algorithm>

#include "kernels/base/status.h"
#include "kernels/cuda/attend/late_query.h"
#include "kernels/cuda/device/launch.h"

namespace kvtide::cuda {
namespace {

size_t Ctas(const LaunchPlan& plan) { return plan.workers.size() / static_cast<size_t>(plan.warps); }

void Join(std::vector<LaunchPlan>* launches, int processors) {
  LaunchPlan *exact = nullptr, *coded = nullptr;
  for (LaunchPlan& plan : *launches)
    if (plan.pages > 0 && plan.kernel->k == Form::kF16 && plan.conversions.empty()) exact = &plan;
  if (exact == nullptr || processors < 2) return;
  for (LaunchPlan& plan : *launches)
    if (plan.pages > 0 && CanJoin(*plan.kernel, *exact->kernel) &&
        (coded == nullptr || plan.pages * plan.page_bytes > coded->pages * coded->page_bytes))
      coded = &plan;
  if (coded == nullptr) return;
  exact->ctas = static_cast<int>(ExactCtas(static_cast<uint32_t>(processors), coded->pages, coded->page_bytes,
                                           exact->pages, exact->page_bytes));
  exact->warps = coded->kernel->joint.exact_warps;
  exact->joined = true;
  coded->ctas = processors - exact->ctas;
  coded->exact = exact;
}

}  // namespace

void CutLaunches(std::vector<LaunchPlan>* launches, int processors) {
  for (LaunchPlan& plan : *launches) {
    plan.pages = NumberPages(&plan.units);
    plan.ctas = processors;
    plan.warps = plan.kernel->threads / 32;
    for (const AttendUnit& unit : plan.units) plan.most_rows = std::max(plan.most_rows, unit.rows);
  }
  Join(launches, processors);
  for (LaunchPlan& plan : *launches) plan.workers = CutShares(plan.units, plan.ctas, plan.warps);
}

absl::Status LaunchUnits(const LaunchPlan& plan, int page_dim, bool overlap, UnitsAfter after,
                         cudaStream_t stream) {
  if (plan.units.empty() || plan.joined) return absl::OkStatus();
  for (const Conversion& c : plan.conversions) {
    const CachePair pair = c.layout->pair();
    const int jobs = static_cast<int>(c.k.size());
    KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(pair.k, Side::kKey, c.layout->k(), RowTarget::kF16Page, page_dim,
                                             c.k_device, jobs, stream));
    KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(pair.v, Side::kValue, c.layout->v(), RowTarget::kF16Page,
                                             page_dim, c.v_device, jobs, stream));
  }
  const bool dependent = overlap && after != UnitsAfter::kAnything && plan.conversions.empty();
  const AttendKernel& kernel = *plan.kernel;
  const bool joint = plan.exact != nullptr;
  const void* query = joint ? kernel.joint.query_function : kernel.query_function;
  if (dependent && after == UnitsAfter::kRows) {
    const void* const late = joint ? LateJointQueryKernel(kernel) : LateQueryKernel(kernel);
    if (late == nullptr) overlap = false;
    if (late != nullptr) query = late;
  }
  if (!joint) {
    AttendParams params = plan.params;
    // Rows of calibrated keys' queries are turned together, by all warps that there may be.
    const bool calibrated = IsCalibrated(kernel.k);
    KVTIDE_RETURN_IF_ERROR(LaunchKernel(query, plan.units.size(),
                                        calibrated ? kernel.query_threads : 32 * plan.most_rows, 0, dependent,
                                        &params, stream));
    return LaunchKernel(kernel.function, Ctas(plan), kernel.threads, kernel.shared_bytes, overlap, &params,
                        stream);
  }
  const LaunchPlan& exact = *plan.exact;
  JointParams params{plan.params, exact.params, plan.joint_workers, static_cast<uint32_t>(plan.units.size())};
  KVTIDE_RETURN_IF_ERROR(LaunchKernel(query, plan.units.size() + exact.units.size(),
                                      32 * std::max(plan.most_rows, exact.most_rows), 0, dependent, &params,
                                      stream));
  return LaunchKernel(kernel.joint.function, Ctas(plan) + Ctas(exact), kernel.threads,
                      kernel.joint.shared_bytes, overlap, &params, stream);
}

}  // namespace kvtide::cuda
