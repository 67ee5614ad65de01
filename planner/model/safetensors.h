// Sizes of safetensors weights from headers alone: one file, or a folder of shards. No tensor is read.
// The parsers take bytes (tests and fuzzers call them); the readers open files.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace kvtide::planner {

struct SafetensorsHeader {
  int64_t header_bytes = 0;  // JSON text, without the 8 bytes of its length
  int64_t tensors = 0;
  int64_t tensor_bytes = 0;  // sum over tensors
  int64_t elements = 0;
};

constexpr int64_t kMaxSafetensorsHeader = 100'000'000;

// The first 8 bytes of a file: the length of the JSON header.
absl::StatusOr<int64_t> ParseSafetensorsLength(std::string_view first_bytes);

// The JSON text. `data_bytes` is what follows it in the file; < 0 = unknown. Errors name the tensor.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view json, int64_t data_bytes);

absl::StatusOr<SafetensorsHeader> ReadSafetensorsFile(const std::string& path);
// Sums all *.safetensors of a folder. Shards that the index names but that are missing are an error.
absl::StatusOr<SafetensorsHeader> ReadSafetensorsFolder(const std::string& path);

}  // namespace kvtide::planner
