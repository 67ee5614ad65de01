// A plan as settings that can be used as they stand: command-line flags of llama.cpp, vLLM and SGLang, the
// configuration of kvtided. They are for the largest context of the plan; FailedPrecondition when it does not
// fit.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

absl::StatusOr<std::string> RenderLlamaArgs(const PlanRequest& request, const Plan& plan);
absl::StatusOr<std::string> RenderVllmArgs(const PlanRequest& request, const Plan& plan);
absl::StatusOr<std::string> RenderSglangArgs(const PlanRequest& request, const Plan& plan);
// JSON with the fields of kvtide.v1.KvtidedConfig. The device tier gets all memory that the plan leaves for
// the cache.
absl::StatusOr<std::string> RenderKvtidedConfig(const PlanRequest& request, const Plan& plan);

}  // namespace kvtide::planner
