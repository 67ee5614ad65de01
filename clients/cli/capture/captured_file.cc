#include "clients/cli/capture/captured_file.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

using engine::ShapeText;
using engine::WeightMap;
using engine::WeightTensor;

constexpr int kMaxHeadDim = 512;
constexpr int64_t kMaxTokens = int64_t{1} << 24;

std::string TensorName(int layer, const char* part) { return absl::StrCat("layers.", layer, ".", part); }

// The number of a tensor named layers.{i}.PART with a known part.
std::optional<int> LayerOf(const std::string& name) {
  constexpr char kPrefix[] = "layers.";
  if (name.rfind(kPrefix, 0) != 0) return std::nullopt;
  const size_t begin = std::strlen(kPrefix), dot = name.find('.', begin);
  if (dot == std::string::npos) return std::nullopt;
  const std::string part = name.substr(dot + 1);
  int layer = 0;
  if (part != "k" && part != "v" && part != "q" && part != "sinks") return std::nullopt;
  if (!absl::SimpleAtoi(name.substr(begin, dot - begin), &layer) || layer < 0 || layer > 4096)
    return std::nullopt;
  return layer;
}

absl::StatusOr<WeightTensor> Find(const WeightMap& tensors, int layer, const char* part, size_t rank) {
  const std::string name = TensorName(layer, part);
  const auto found = tensors.find(name);
  if (found == tensors.end()) {
    return absl::NotFoundError(
        absl::StrCat("there is no tensor ", name,
                     "; a captured file has layers.{i}.k, layers.{i}.v and layers.{i}.q for i = 0, 1, ..."));
  }
  const WeightTensor& tensor = found->second;
  if (!tensor.type) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is ", tensor.type_name, "; captured tensors are F32, F16 or BF16"));
  }
  if (tensor.shape.size() != rank || std::count(tensor.shape.begin(), tensor.shape.end(), 0) > 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, " has the shape ", ShapeText(tensor.shape), ", not ",
                                                   rank == 3 ? "[tokens, heads, head_dim]" : "[heads]"));
  }
  return tensor;
}

absl::Status CheckHeadDim(const std::string& name, int64_t dim) {
  if (dim >= 16 && dim <= kMaxHeadDim && dim % 16 == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " has the head dim ", dim, "; known are multiples of 16 up to ", kMaxHeadDim));
}

absl::StatusOr<CapturedLayer> ParseLayer(const WeightMap& tensors, int index) {
  CapturedLayer layer;
  KVTIDE_ASSIGN_OR_RETURN(layer.k, Find(tensors, index, "k", 3));
  KVTIDE_ASSIGN_OR_RETURN(layer.v, Find(tensors, index, "v", 3));
  KVTIDE_ASSIGN_OR_RETURN(layer.q, Find(tensors, index, "q", 3));
  const std::vector<int64_t>&k = layer.k.shape, &v = layer.v.shape, &q = layer.q.shape;
  const auto names = [&](const char* a, const char* b) {
    return absl::StrCat(TensorName(index, a), " ", ShapeText(a[0] == 'q' ? q : k), " and ",
                        TensorName(index, b), " ", ShapeText(b[0] == 'v' ? v : k));
  };
  if (k[0] != v[0] || k[1] != v[1]) {
    return absl::InvalidArgumentError(absl::StrCat(names("k", "v"), " differ in tokens or KV heads"));
  }
  if (q[2] != k[2])
    return absl::InvalidArgumentError(absl::StrCat(names("q", "k"), " differ in the head dim"));
  if (q[0] > k[0]) {
    return absl::InvalidArgumentError(absl::StrCat(
        names("q", "k"), ": there are more queries than tokens; queries are those of the last tokens"));
  }
  if (q[1] % k[1] != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(names("q", "k"), ": the query heads are no multiple of the KV heads"));
  }
  if (k[0] > kMaxTokens || q[1] > 1024) {
    return absl::InvalidArgumentError(absl::StrCat(names("q", "k"), ": too many tokens or heads"));
  }
  KVTIDE_RETURN_IF_ERROR(CheckHeadDim(TensorName(index, "k"), k[2]));
  KVTIDE_RETURN_IF_ERROR(CheckHeadDim(TensorName(index, "v"), v[2]));
  layer.tokens = k[0];
  layer.queries = q[0];
  layer.shape = {static_cast<int>(q[1]),
                 static_cast<int>(k[1]),
                 static_cast<int>(k[2]),
                 static_cast<int>(v[2]),
                 1.0f / std::sqrt(static_cast<float>(k[2])),
                 0};
  if (tensors.count(TensorName(index, "sinks")) > 0) {
    KVTIDE_ASSIGN_OR_RETURN(layer.sinks, Find(tensors, index, "sinks", 1));
    if (layer.sinks.shape[0] != q[1]) {
      return absl::InvalidArgumentError(absl::StrCat(
          TensorName(index, "sinks"), " has ", layer.sinks.shape[0], " values for ", q[1], " query heads"));
    }
  }
  return layer;
}

absl::Status ApplyMetadata(const std::map<std::string, std::string>& metadata,
                           std::vector<CapturedLayer>* layers) {
  const auto text = [&](const char* name) {
    const auto found = metadata.find(name);
    return found == metadata.end() ? std::string() : found->second;
  };
  const std::string rope = text(kCaptureRope), scale = text(kCaptureScale), window = text(kCaptureWindow);
  if (!rope.empty() && rope != "applied") {
    return absl::InvalidArgumentError(
        absl::StrCat("the metadata says rope \"", rope,
                     "\"; capture keys and queries as a cache gets them, after RoPE (\"applied\")"));
  }
  for (CapturedLayer& layer : *layers) {
    if (!scale.empty() && (!absl::SimpleAtof(scale, &layer.shape.scale) || !(layer.shape.scale > 0) ||
                           !std::isfinite(layer.shape.scale))) {
      return absl::InvalidArgumentError(
          absl::StrCat("the metadata says scale \"", scale, "\", which is no factor"));
    }
    if (!window.empty() &&
        (!absl::SimpleAtoi(window, &layer.shape.sliding_window) || layer.shape.sliding_window < 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the metadata says sliding_window \"", window, "\", which is no number of tokens"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> ReadFloats(const WeightTensor& tensor, const std::string& name) {
  std::vector<float> values(tensor.bytes.size() / DataTypeBytes(*tensor.type));
  for (size_t i = 0; i < values.size(); ++i) {
    if (*tensor.type == DataType::kF32) {
      std::memcpy(&values[i], tensor.bytes.data() + 4 * i, 4);  // tensors may lie anywhere in the file
    } else {
      uint16_t bits;
      std::memcpy(&bits, tensor.bytes.data() + 2 * i, 2);
      values[i] = *tensor.type == DataType::kF16 ? F16ToF32(bits) : Bf16ToF32(bits);
    }
    if (!std::isfinite(values[i]))
      return absl::InvalidArgumentError(absl::StrCat(name, " has the value ", values[i], " at ", i));
  }
  return values;
}

}  // namespace

absl::StatusOr<std::vector<CapturedLayer>> ParseCapture(std::span<const std::byte> file,
                                                        std::map<std::string, std::string>* metadata) {
  KVTIDE_ASSIGN_OR_RETURN(const WeightMap tensors, engine::ParseSafetensors(file, metadata));
  int count = 0;
  for (const auto& [name, tensor] : tensors) {
    if (const auto layer = LayerOf(name)) count = std::max(count, *layer + 1);
  }
  std::vector<CapturedLayer> layers;
  for (int i = 0; i < std::max(1, count); ++i) {
    KVTIDE_ASSIGN_OR_RETURN(CapturedLayer layer, ParseLayer(tensors, i));
    if (i > 0 && layer.tokens != layers.front().tokens) {
      return absl::InvalidArgumentError(absl::StrCat(TensorName(i, "k"), " has ", layer.tokens,
                                                     " tokens, layer 0 has ", layers.front().tokens));
    }
    layers.push_back(std::move(layer));
  }
  KVTIDE_RETURN_IF_ERROR(ApplyMetadata(*metadata, &layers));
  return layers;
}

absl::StatusOr<CapturedFile> CapturedFile::Open(const std::string& path) {
  CapturedFile captured;
  captured.path_ = path;
  KVTIDE_ASSIGN_OR_RETURN(captured.file_, engine::MappedFile::Open(path));
  auto layers = ParseCapture(captured.file_->bytes(), &captured.metadata_);
  if (!layers.ok()) return Annotate(layers.status(), path);
  captured.layers_ = *std::move(layers);
  return captured;
}

std::string CapturedFile::Metadata(const std::string& name) const {
  const auto found = metadata_.find(name);
  return found == metadata_.end() ? "" : found->second;
}

uint64_t CapturedFile::Hash() const {
  const std::span<const std::byte> bytes = file_->bytes();
  uint64_t hash = 1469598103934665603u ^ bytes.size();
  for (size_t i = 0; i < bytes.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min<size_t>(8, bytes.size() - i));
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash;
}

absl::StatusOr<LayerVectors> CapturedFile::Read(int index) const {
  const CapturedLayer& layer = layers_[static_cast<size_t>(index)];
  const auto read = [&](const WeightTensor& tensor, const char* part) {
    return ReadFloats(tensor, absl::StrCat(path_, ": ", TensorName(index, part)));
  };
  LayerVectors vectors;
  KVTIDE_ASSIGN_OR_RETURN(vectors.k, read(layer.k, "k"));
  KVTIDE_ASSIGN_OR_RETURN(vectors.v, read(layer.v, "v"));
  KVTIDE_ASSIGN_OR_RETURN(vectors.q, read(layer.q, "q"));
  if (!layer.sinks.bytes.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(vectors.sinks, read(layer.sinks, "sinks"));
  }
  return vectors;
}

}  // namespace kvtide::cli
