// A model from what a person names: a GGUF file, a config.json, a folder of safetensors, or a catalogue name.
#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "planner/model/config_json.h"
#include "planner/model/weight_size.h"
#include "planner/model/weights.h"

namespace kvtide::planner {

struct LoadedModel {
  ModelGeometry geometry;
  std::optional<Weights> weights;  // when the files have them
};

// `files` says for whom weights that a name carries (Qwen3-32B-AWQ) are sized.
absl::StatusOr<LoadedModel> LoadModel(const std::string& name_or_path, const ReadOptions& options = {},
                                      WeightFiles files = WeightFiles::kGguf);

// "14.4GB", "q4_0", or the path of a GGUF file or a folder of safetensors.
absl::StatusOr<Weights> LoadWeights(const std::string& text, const ModelGeometry& model,
                                    WeightFiles files = WeightFiles::kGguf);

}  // namespace kvtide::planner
