// Writes Hugging Face safetensors. What is written is whole or not there: a file appears under its name when
// all of it is on disk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/base/data_type.h"

namespace kvtide::engine {

struct TensorToWrite {
  std::string name;
  DataType type = DataType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  // row-major, little-endian; only WriteSafetensors looks at them

  int64_t size() const;  // bytes by type and shape
};

// The beginning of a file: length and JSON, filled up to whole words. The tensors follow in this order,
// without gaps.
std::string SafetensorsHeader(std::span<const TensorToWrite> tensors,
                              const std::map<std::string, std::string>& metadata);

// INVALID_ARGUMENT for a path that cannot be written.
absl::Status WriteSafetensors(const std::string& path, std::span<const TensorToWrite> tensors,
                              const std::map<std::string, std::string>& metadata);

// For a failed write of `path`, from errno.
absl::Status FailedWrite(const std::string& path);

}  // namespace kvtide::engine
