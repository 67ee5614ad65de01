// A model on disk: a Hugging Face folder (config.json and safetensors, sharded or not) or a GGUF file (or the
// first part of a split). Either gives a ModelConfig and tensors by their Hugging Face names; what a GGUF
// file writes otherwise (names, order of RoPE pairs, norms with the 1 added) is put right here.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/engine/model_config.h"
#include "clients/engine/safetensors.h"
#include "planner/model/gguf.h"

namespace kvtide::engine {

// True if the path names a GGUF file by its ending.
bool IsGguf(const std::string& path);

// INVALID_ARGUMENT or UNIMPLEMENTED names the key or the architecture.
absl::StatusOr<ModelConfig> ConfigOfGguf(const planner::GgufFile& file);

class ModelFiles {
 public:
  static absl::StatusOr<ModelFiles> Open(const std::string& path);

  const ModelConfig& config() const { return config_; }
  // As SafetensorsFolder::Get.
  absl::StatusOr<WeightTensor> Get(const std::string& name, std::span<const int64_t> shape) const;
  size_t bytes() const;  // of all tensors

 private:
  absl::Status OpenGguf(const std::string& path);

  std::string path_;
  ModelConfig config_;
  std::optional<SafetensorsFolder> folder_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  WeightMap tensors_;
};

}  // namespace kvtide::engine
