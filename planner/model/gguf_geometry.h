// Geometry and weights from the metadata of a GGUF file, by the rules of llama.cpp's model loader.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "planner/model/config_json.h"
#include "planner/model/geometry.h"
#include "planner/model/gguf.h"

namespace kvtide::planner {

absl::StatusOr<ModelGeometry> GeometryFromGguf(const GgufFile& file, const std::string& name,
                                               const ReadOptions& options = {});

// Bytes on the GPU with all layers offloaded: the token embedding stays on the CPU, unless it doubles as
// output matrix.
int64_t GgufDeviceBytes(const GgufFile& file);

}  // namespace kvtide::planner
