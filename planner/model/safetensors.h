// Headers of safetensors files: what tensors there are, their types, shapes and places. No tensor is read;
// the planner sums their sizes and the reference engine maps the bytes. The parsers take bytes (tests and
// fuzzers call them); the readers open files.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace kvtide::planner {

struct SafetensorsTensor {
  std::string dtype;  // "F32", "BF16", "I8", ...
  std::vector<int64_t> shape;
  int64_t elements = 0;
  int64_t begin = 0, end = 0;  // bytes of the data, which follows the header
};

struct SafetensorsHeader {
  int64_t header_bytes = 0;  // JSON text, without the 8 bytes of its length
  std::map<std::string, SafetensorsTensor> tensors;
  std::map<std::string, std::string> notes;  // the texts of __metadata__
  int64_t tensor_bytes = 0;                  // sum over tensors
  int64_t elements = 0;
};

constexpr int64_t kMaxSafetensorsHeader = 100'000'000;

// The first 8 bytes of a file: the length of the JSON header.
absl::StatusOr<int64_t> ParseSafetensorsLength(std::string_view first_bytes);

// The JSON text. `data_bytes` is what follows it in the file; < 0 = unknown. Errors name the tensor; tensors
// that share bytes are one.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view json, int64_t data_bytes);

absl::StatusOr<SafetensorsHeader> ReadSafetensorsFile(const std::string& path);
// The files of a folder, by name: those of its index, else all *.safetensors. NotFound if there is none.
absl::StatusOr<std::set<std::string>> SafetensorsShards(const std::string& folder);
// All tensors of a folder. Shards that the index names but that are missing are an error, and so is a tensor
// in two of them; begin and end are those within the shard.
absl::StatusOr<SafetensorsHeader> ReadSafetensorsFolder(const std::string& path);

}  // namespace kvtide::planner
