// Reads the header of a GGUF file: metadata and tensor sizes, no tensor data. Every count, length and product
// is checked before it is used; a damaged file gives one clear error. Arrays of numbers are kept up to a
// limit, arrays of strings (vocabularies) only as their length.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"

namespace kvtide::planner {

struct GgufArray {
  uint64_t count = 0;
  std::vector<int64_t> integers;  // empty for arrays of strings and floats
};

using GgufValue = std::variant<int64_t, double, bool, std::string, GgufArray>;

struct GgufTensor {
  std::string name;
  int64_t elements = 0;
  int64_t bytes = 0;
};

struct GgufFile {
  uint32_t version = 0;
  std::map<std::string, GgufValue> metadata;
  std::vector<GgufTensor> tensors;
  int64_t tensor_bytes = 0;

  // Missing keys give `fallback`; a value of another kind is InvalidArgument that names the key.
  absl::StatusOr<int64_t> Integer(const std::string& key, int64_t fallback) const;
  // A scalar gives `count` copies; an array must have at least `count` entries. Empty when missing.
  absl::StatusOr<std::vector<int64_t>> Integers(const std::string& key, size_t count) const;
  bool Has(const std::string& key) const { return metadata.count(key) > 0; }
};

// `header` is the beginning of the file; OutOfRange means that it is too short and more bytes may help.
absl::StatusOr<GgufFile> ParseGguf(std::string_view header);

// Opens a file, and with it the other parts of a split (-00001-of-000NN); tensors are summed over parts.
absl::StatusOr<GgufFile> ReadGguf(const std::string& path);

}  // namespace kvtide::planner
