// Models and cards that kvtide knows by name. The tables are CSV files of this folder, built into the
// program.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/model/device.h"
#include "planner/model/geometry.h"

namespace kvtide::planner {

// By catalogue name, alias, Hugging Face id or tag (model_name.h). Case, '-', '_', ':' and spaces do not
// matter: "gemma-4-26b-a4b" is "Gemma4-26B-A4B". NotFound names the nearest, or the sizes of a family;
// Unimplemented says why a model that is known by name is not in the catalogue.
absl::StatusOr<ModelGeometry> FindModel(const std::string& name);
const std::vector<ModelGeometry>& CatalogueModels();

// Who makes a card need not be said ("NVIDIA GeForce RTX 4090", "4090"), a size may ("M4 Max 64GB", "RTX 3090
// 24GB"). A name of several devices is an error that lists them by memory, unless they differ in speed alone:
// then one is taken and the budget's assumption says which.
absl::StatusOr<DeviceBudget> FindGpu(const std::string& name);
const std::vector<DeviceBudget>& CatalogueGpus();

}  // namespace kvtide::planner
