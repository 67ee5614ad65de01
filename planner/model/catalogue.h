// Models and cards that kvtide knows by name. The tables are CSV files of this folder, built into the
// program.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/model/geometry.h"
#include "planner/plan/device.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

// Case, '-', '_' and spaces do not matter: "gemma-4-26b-a4b" is "Gemma4-26B-A4B". NotFound names the nearest.
absl::StatusOr<ModelGeometry> FindModel(const std::string& name);
const std::vector<ModelGeometry>& CatalogueModels();

absl::StatusOr<DeviceBudget> FindGpu(const std::string& name);
const std::vector<DeviceBudget>& CatalogueGpus();

// Weights for "q4_0", "bf16", ...: the published file where there is one, else parameters x bits.
absl::StatusOr<Weights> EstimateWeights(const ModelGeometry& model, const std::string& quantisation);

}  // namespace kvtide::planner
