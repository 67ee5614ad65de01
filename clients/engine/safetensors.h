// Tensors of Hugging Face safetensors with their bytes: one file, or a folder of shards. What the headers say
// is read by planner/model/safetensors.h. Files are memory-mapped read-only; a WeightTensor borrows from the
// reader that gave it. Readers are immutable after Open and may be used from any thread. A file that is
// truncated, overlaps or lies about a size is refused whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/engine/weight_tensor.h"

namespace kvtide::engine {

std::string ShapeText(std::span<const int64_t> shape);

using WeightMap = std::map<std::string, WeightTensor>;

// Reads the header of a whole file in memory. The views point into `file`. `metadata` receives the file's
// notes.
absl::StatusOr<WeightMap> ParseSafetensors(std::span<const std::byte> file,
                                           std::map<std::string, std::string>* metadata = nullptr);

// INVALID_ARGUMENT when the shape differs, UNIMPLEMENTED when the type is none that the engine computes with.
absl::Status CheckWeight(const WeightTensor& tensor, const std::string& file, const std::string& name,
                         std::span<const int64_t> shape);

// A file mapped into memory, read-only.
class MappedFile {
 public:
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  explicit MappedFile(std::span<const std::byte> bytes) : bytes_(bytes) {}
  std::span<const std::byte> bytes_;
};

// All tensors of a model folder.
class SafetensorsFolder {
 public:
  static absl::StatusOr<SafetensorsFolder> Open(const std::string& folder);

  bool Has(const std::string& name) const { return tensors_.count(name) > 0; }
  // NOT_FOUND with the folder and the name; INVALID_ARGUMENT when the shape differs or the type is not a
  // float type.
  absl::StatusOr<WeightTensor> Get(const std::string& name, std::span<const int64_t> shape) const;
  const WeightMap& tensors() const { return tensors_; }

 private:
  std::string folder_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  WeightMap tensors_;
};

}  // namespace kvtide::engine
