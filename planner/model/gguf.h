// Reads the header of a GGUF file: metadata, tensor types, shapes and places, no tensor data. Every count,
// length and product is checked before it is used; a damaged file gives one clear error. Arrays of numbers
// are kept up to a limit, long ones and arrays of strings (vocabularies) only where the caller asks for them.
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
  std::vector<int64_t> integers;     // empty for arrays of strings and floats
  std::vector<std::string> strings;  // with GgufKeep::kVocabulary
  std::vector<float> floats;         // the same
};

// kVocabulary: arrays of any length and of strings and floats too, as the tokenizer needs them.
enum class GgufKeep { kShape, kVocabulary };

using GgufValue = std::variant<int64_t, double, bool, std::string, GgufArray>;

struct GgufTensor {
  std::string name;
  uint32_t type = 0;           // ggml's number
  std::vector<int64_t> shape;  // the longest stride first: [outputs][inputs] of a matrix
  int part = 0;                // of a split
  int64_t offset = 0;          // in the part's data
  int64_t elements = 0;
  int64_t bytes = 0;
};

struct GgufFile {
  uint32_t version = 0;
  std::map<std::string, GgufValue> metadata;
  std::vector<GgufTensor> tensors;
  int64_t tensor_bytes = 0;
  std::vector<std::string> paths;   // of each part; empty for a header parsed from memory
  std::vector<int64_t> data_begin;  // byte of each part where its data begins

  // Missing keys give `fallback`; a value of another kind is InvalidArgument that names the key.
  absl::StatusOr<int64_t> Integer(const std::string& key, int64_t fallback) const;
  // A scalar gives `count` copies; an array must have at least `count` entries. Empty when missing.
  absl::StatusOr<std::vector<int64_t>> Integers(const std::string& key, size_t count) const;
  bool Has(const std::string& key) const { return metadata.count(key) > 0; }
};

// `header` is the beginning of the file; OutOfRange means that it is too short and more bytes may help.
absl::StatusOr<GgufFile> ParseGguf(std::string_view header, GgufKeep keep = GgufKeep::kShape);

// Opens a file, and with it the other parts of a split (-00001-of-000NN); tensors are summed over parts.
absl::StatusOr<GgufFile> ReadGguf(const std::string& path, GgufKeep keep = GgufKeep::kShape);

}  // namespace kvtide::planner
