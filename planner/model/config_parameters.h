// How many parameters a model has, counted from the widths in its config.json: all of them, those of routed
// experts, those that one token uses, and those of embedding and head. Good to a few percent (norms, biases
// and next-token layers are left out); where files with tensors are at hand, those are counted instead.
#pragma once

#include <nlohmann/json.hpp>

#include "planner/model/geometry.h"

namespace kvtide::planner {

// Fills params_total, params_experts, params_active and params_embedding of a model whose layers are read
// from `config`. Leaves them 0 when a width that they need is not given.
void CountParameters(const nlohmann::json& config, ModelGeometry* model);

}  // namespace kvtide::planner
