// The limits of a planning request, and the check that names the field that breaks one.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

constexpr int64_t kMaxPlannedContext = int64_t{1} << 30;
constexpr int kMaxPlannedConcurrency = 1 << 20;

absl::Status CheckPlanRequest(const PlanRequest& request);

}  // namespace kvtide::planner
