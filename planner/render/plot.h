// The plan as an SVG picture: memory against context per pair with the line of the device, and measured harm
// against context for the pair that the planner would choose. Curves are computed from the request, not
// interpolated.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

absl::StatusOr<std::string> RenderSvg(const PlanRequest& request);

}  // namespace kvtide::planner
