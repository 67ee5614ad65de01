// What to do with a cache that is larger than the device: the part that stays, the part that goes to the
// host, and what a decode step then costs.
#pragma once

#include <optional>

#include "planner/plan/plan.h"

namespace kvtide::planner {

// The fastest way to run `candidate`, which does not fit, with the host's help; nullopt when there is no room
// or the engine has no such mode. `traffic` is that of a step with everything on the device.
std::optional<Split> BestSplit(const PlanRequest& request, const Candidate& candidate,
                               const StepTraffic& traffic);

}  // namespace kvtide::planner
