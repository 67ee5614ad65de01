// What an engine cannot do on a card, and what it does otherwise than asked: apart from memory, the reasons
// why a plan would not start. Facts are those of vLLM 0.33, SGLang 0.5.23, llama.cpp and kvtide's own
// backends.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

// InvalidArgument when the engine does not run on the device, or cannot load weights of the format; says what
// to take instead. Devices and weights of unknown kind pass.
absl::Status CheckHardware(const PlanRequest& request);

// Where weights are loaded but not computed with as their format promises, where files are read in an
// experimental way, and sizes of weights that can hardly be meant.
std::vector<std::string> HardwareNotes(const PlanRequest& request);

}  // namespace kvtide::planner
