#include "planner/model/load_model.h"

#include <filesystem>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "planner/model/catalogue.h"
#include "planner/model/gguf_geometry.h"
#include "planner/model/safetensors.h"

namespace kvtide::planner {
namespace {

namespace fs = std::filesystem;

constexpr uintmax_t kMaxConfigBytes = uintmax_t{64} << 20;

absl::StatusOr<std::string> ReadText(const fs::path& path) {
  std::error_code error;
  const uintmax_t size = fs::file_size(path, error);
  std::ifstream file(path);
  if (!file || error) return absl::NotFoundError(absl::StrCat(path.string(), ": cannot be opened"));
  if (size > kMaxConfigBytes)
    return absl::InvalidArgumentError(absl::StrCat(path.string(), ": larger than 64 MiB"));
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string NameOf(const fs::path& path) {
  const fs::path clean = path.filename().empty() ? path.parent_path() : path;
  return clean.filename().string();
}

absl::StatusOr<LoadedModel> LoadConfig(const fs::path& path, const std::string& name,
                                       const ReadOptions& options) {
  KVTIDE_ASSIGN_OR_RETURN(const std::string text, ReadText(path));
  LoadedModel loaded;
  absl::StatusOr<ModelGeometry> geometry = GeometryFromConfigJson(text, name, options);
  if (!geometry.ok()) return Annotate(geometry.status(), path.string());
  loaded.geometry = *std::move(geometry);
  return loaded;
}

absl::StatusOr<LoadedModel> LoadFolder(const fs::path& path, const ReadOptions& options) {
  KVTIDE_ASSIGN_OR_RETURN(LoadedModel loaded, LoadConfig(path / "config.json", NameOf(path), options));
  const absl::StatusOr<SafetensorsHeader> header = ReadSafetensorsFolder(path.string());
  if (header.ok()) {
    loaded.weights = Weights{header->tensor_bytes, Provenance::kExact,
                             absl::StrCat(header->tensors, " tensors of the safetensors headers")};
    loaded.geometry.params_total = header->elements;
  } else if (!absl::IsNotFound(header.status())) {
    return header.status();
  }
  return loaded;
}

absl::StatusOr<Weights> GgufWeights(const GgufFile& file, const std::string& path) {
  return Weights{GgufDeviceBytes(file), Provenance::kExact,
                 absl::StrCat(file.tensors.size(), " tensors of ", NameOf(path),
                              ", without a token embedding that stays on the CPU")};
}

}  // namespace

absl::StatusOr<LoadedModel> LoadModel(const std::string& name_or_path, const ReadOptions& options) {
  const fs::path path(name_or_path);
  std::error_code error;
  if (fs::is_directory(path, error)) return LoadFolder(path, options);
  if (path.extension() == ".gguf") {
    KVTIDE_ASSIGN_OR_RETURN(const GgufFile file, ReadGguf(name_or_path));
    absl::StatusOr<ModelGeometry> geometry = GeometryFromGguf(file, path.stem().string(), options);
    if (!geometry.ok()) return Annotate(geometry.status(), name_or_path);
    KVTIDE_ASSIGN_OR_RETURN(const Weights weights, GgufWeights(file, name_or_path));
    return LoadedModel{*std::move(geometry), weights};
  }
  if (path.extension() == ".json") return LoadConfig(path, NameOf(path.parent_path()), options);
  if (fs::exists(path, error) && path.has_parent_path()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name_or_path, ": neither .gguf, .json nor a folder with a config.json"));
  }
  KVTIDE_ASSIGN_OR_RETURN(ModelGeometry geometry, FindModel(name_or_path));
  return LoadedModel{std::move(geometry), std::nullopt};
}

absl::StatusOr<Weights> LoadWeights(const std::string& text, const ModelGeometry& model) {
  const fs::path path(text);
  std::error_code error;
  if (fs::is_directory(path, error)) {
    KVTIDE_ASSIGN_OR_RETURN(const SafetensorsHeader header, ReadSafetensorsFolder(text));
    return Weights{header.tensor_bytes, Provenance::kExact, absl::StrCat("safetensors headers of ", text)};
  }
  if (path.extension() == ".gguf") {
    KVTIDE_ASSIGN_OR_RETURN(const GgufFile file, ReadGguf(text));
    return GgufWeights(file, text);
  }
  if (path.extension() == ".safetensors") {
    KVTIDE_ASSIGN_OR_RETURN(const SafetensorsHeader header, ReadSafetensorsFile(text));
    return Weights{header.tensor_bytes, Provenance::kExact, absl::StrCat("safetensors header of ", text)};
  }
  const absl::StatusOr<int64_t> bytes = ParseBytes(text);
  if (bytes.ok()) return Weights{*bytes, Provenance::kExact, absl::StrCat("given as ", text)};
  return EstimateWeights(model, text);
}

}  // namespace kvtide::planner
