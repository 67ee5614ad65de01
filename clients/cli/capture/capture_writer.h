// Writes a captured file (captured_file.h) while a model runs: the shapes are known beforehand, so every
// vector goes straight to its place and memory stays small. The file appears under its name when Finish
// succeeds. Used from one thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/engine/kv_store.h"
#include "kernels/base/data_type.h"

namespace kvtide::cli {

struct CaptureShape {
  engine::KvGeometry geometry;
  int64_t tokens = 0;
  int64_t queries = 0;  // of the last tokens
  DataType type = DataType::kF32;
};

class CaptureWriter {
 public:
  static absl::StatusOr<std::unique_ptr<CaptureWriter>> Create(
      const std::string& path, const CaptureShape& shape, const std::map<std::string, std::string>& metadata);
  // Removes what was written unless Finish succeeded.
  ~CaptureWriter();
  CaptureWriter(const CaptureWriter&) = delete;
  CaptureWriter& operator=(const CaptureWriter&) = delete;

  // Vectors of `n` tokens from position `start` on, shapes as in KvStore::AppendAttend. INVALID_ARGUMENT when
  // the file's element type cannot hold a value.
  absl::Status Write(int layer, int64_t start, int n, const float* q, const float* k, const float* v);

  absl::Status Finish();
  int64_t bytes() const { return data_begin_ + data_bytes_; }

 private:
  CaptureWriter(std::string path, const CaptureShape& shape) : path_(std::move(path)), shape_(shape) {}
  int64_t LayerOffset(int layer) const;
  absl::Status WriteValues(int64_t element, const float* values, size_t count, const char* what, int layer);

  const std::string path_;
  const CaptureShape shape_;
  int fd_ = -1;
  int64_t data_begin_ = 0, data_bytes_ = 0;
  bool finished_ = false;
};

}  // namespace kvtide::cli
