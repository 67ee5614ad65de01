// The arithmetic of one pair at one context length, line by line, so that a person can check it with a pocket
// calculator: cache, recurrent state, every other item, the sum and what is left.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

absl::StatusOr<std::string> ExplainPair(const PlanRequest& request, const TypePair& pair, int64_t context);

}  // namespace kvtide::planner
