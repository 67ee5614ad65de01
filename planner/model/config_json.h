// Geometry from a Hugging Face config.json (the text part of multimodal models too). A field that may change
// the cache and that kvtide does not know is an error with its name, unless the caller asks to go on; then it
// becomes an assumption.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "planner/model/geometry.h"

namespace kvtide::planner {

class ConfigObject;

struct ReadOptions {
  bool ignore_unknown_fields = false;
};

absl::StatusOr<ModelGeometry> GeometryFromConfig(const ConfigObject& config, const std::string& name,
                                                 const ReadOptions& options = {});
absl::StatusOr<ModelGeometry> GeometryFromConfigJson(const std::string& text, const std::string& name,
                                                     const ReadOptions& options = {});

}  // namespace kvtide::planner
