// Attention of the CPU backend above single pages: turns queries into the frames of the stored keys, runs the
// tasks of a cut (attend_cut.h) on a pool and merges their attention states. Queries and results are in the
// caller's type, widened and rounded row by row in the workers.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/base/thread_pool.h"
#include "kernels/cpu/page/page_kernels.h"

namespace kvtide {

// As the calls of Backend of the same names.
absl::Status AttendOnCpu(const AttendArgs& args, const PageKernels& kernels, ThreadPool& pool);
absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttendOnCpu(const AttendPlanArgs& args,
                                                            std::unique_ptr<AttendPlan> previous);
absl::Status AttendLayerOnCpu(AttendPlan& plan, const AttendLayerArgs& args, const PageKernels& kernels,
                              ThreadPool& pool);

}  // namespace kvtide
