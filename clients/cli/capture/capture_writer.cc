#include "clients/cli/capture/capture_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/engine/safetensors_writer.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

std::string PartPath(const std::string& path) { return path + ".part"; }

absl::Status WriteAt(int fd, const std::string& path, const void* data, size_t bytes, int64_t offset) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = pwrite(fd, p, bytes, offset);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return engine::FailedWrite(path);
    p += written;
    bytes -= static_cast<size_t>(written);
    offset += written;
  }
  return absl::OkStatus();
}

std::vector<engine::TensorToWrite> Tensors(const CaptureShape& shape) {
  const engine::KvGeometry& g = shape.geometry;
  std::vector<engine::TensorToWrite> tensors;
  for (int layer = 0; layer < g.layers; ++layer) {
    const auto add = [&](const char* part, int64_t rows, int heads) {
      tensors.push_back(
          {absl::StrCat("layers.", layer, ".", part), shape.type, {rows, heads, g.head_dim}, {}});
    };
    add("k", shape.tokens, g.kv_heads);
    add("v", shape.tokens, g.kv_heads);
    add("q", shape.queries, g.query_heads);
  }
  return tensors;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CaptureWriter>> CaptureWriter::Create(
    const std::string& path, const CaptureShape& shape, const std::map<std::string, std::string>& metadata) {
  std::unique_ptr<CaptureWriter> writer(new CaptureWriter(path, shape));
  writer->fd_ = open(PartPath(path).c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (writer->fd_ < 0) return engine::FailedWrite(path);
  const std::vector<engine::TensorToWrite> tensors = Tensors(shape);
  for (const engine::TensorToWrite& tensor : tensors) writer->data_bytes_ += tensor.size();
  const std::string header = engine::SafetensorsHeader(tensors, metadata);
  writer->data_begin_ = static_cast<int64_t>(header.size());
  KVTIDE_RETURN_IF_ERROR(WriteAt(writer->fd_, path, header.data(), header.size(), 0));
  return writer;
}

CaptureWriter::~CaptureWriter() {
  if (fd_ >= 0) close(fd_);
  if (fd_ >= 0 && !finished_) std::remove(PartPath(path_).c_str());
}

int64_t CaptureWriter::LayerOffset(int layer) const {
  const engine::KvGeometry& g = shape_.geometry;
  return layer * (2 * shape_.tokens * static_cast<int64_t>(g.kv_width()) +
                  shape_.queries * static_cast<int64_t>(g.query_width()));
}

absl::Status CaptureWriter::WriteValues(int64_t element, const float* values, size_t count, const char* what,
                                        int layer) {
  const int64_t offset = data_begin_ + element * static_cast<int64_t>(DataTypeBytes(shape_.type));
  for (size_t i = 0; i < count; ++i) {
    const float stored = shape_.type == DataType::kF16    ? F16ToF32(F32ToF16(values[i]))
                         : shape_.type == DataType::kBf16 ? Bf16ToF32(F32ToBf16(values[i]))
                                                          : values[i];
    if (!std::isfinite(stored)) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, " has ", values[i], " in ", what,
                                                     ", which ", DataTypeName(shape_.type),
                                                     " cannot hold; use --dtype f32"));
    }
  }
  if (shape_.type == DataType::kF32) return WriteAt(fd_, path_, values, 4 * count, offset);
  std::vector<uint16_t> bits(count);
  for (size_t i = 0; i < count; ++i)
    bits[i] = shape_.type == DataType::kF16 ? F32ToF16(values[i]) : F32ToBf16(values[i]);
  return WriteAt(fd_, path_, bits.data(), 2 * count, offset);
}

absl::Status CaptureWriter::Write(int layer, int64_t start, int n, const float* q, const float* k,
                                  const float* v) {
  const engine::KvGeometry& g = shape_.geometry;
  const auto kv_width = static_cast<int64_t>(g.kv_width()), q_width = static_cast<int64_t>(g.query_width());
  const int64_t begin = LayerOffset(layer), kv_values = shape_.tokens * kv_width;
  const size_t count = static_cast<size_t>(n) * g.kv_width();
  KVTIDE_RETURN_IF_ERROR(WriteValues(begin + start * kv_width, k, count, "K", layer));
  KVTIDE_RETURN_IF_ERROR(WriteValues(begin + kv_values + start * kv_width, v, count, "V", layer));
  const int64_t first_query = shape_.tokens - shape_.queries,
                skipped = std::max<int64_t>(0, first_query - start);
  if (skipped >= n) return absl::OkStatus();
  return WriteValues(begin + 2 * kv_values + (start + skipped - first_query) * q_width, q + skipped * q_width,
                     static_cast<size_t>((n - skipped) * q_width), "Q", layer);
}

absl::Status CaptureWriter::Finish() {
  if (fsync(fd_) != 0 || std::rename(PartPath(path_).c_str(), path_.c_str()) != 0)
    return engine::FailedWrite(path_);
  finished_ = true;
  return absl::OkStatus();
}

}  // namespace kvtide::cli
