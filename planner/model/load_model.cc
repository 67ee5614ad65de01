#include "planner/model/load_model.h"

#include <filesystem>
#include <fstream>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "planner/model/catalogue.h"
#include "planner/model/gguf_geometry.h"
#include "planner/model/model_name.h"
#include "planner/model/safetensors.h"
#include "planner/model/weight_size.h"

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
                             absl::StrCat(header->tensors.size(), " tensors of the safetensors headers")};
    // Packed formats hold several parameters in an element; then the widths of the config count better.
    const bool packed = loaded.geometry.params_total > header->elements + header->elements / 8;
    if (!packed) {
      const double share =
          loaded.geometry.params_total > 0
              ? static_cast<double>(header->elements) / static_cast<double>(loaded.geometry.params_total)
              : 0;
      loaded.geometry.params_total = header->elements;
      loaded.geometry.params_active =
          static_cast<int64_t>(static_cast<double>(loaded.geometry.params_active) * share);
      loaded.geometry.params_experts =
          static_cast<int64_t>(static_cast<double>(loaded.geometry.params_experts) * share);
    }
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

absl::StatusOr<LoadedModel> LoadModel(const std::string& name_or_path, const ReadOptions& options,
                                      WeightFiles files) {
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
  LoadedModel loaded;
  KVTIDE_ASSIGN_OR_RETURN(loaded.geometry, FindModel(name_or_path));
  // A name that says how its weights are coded: Qwen/Qwen3-32B-AWQ, qwen3:32b-q4_K_M.
  const std::string weights = ReadModelName(name_or_path).weights;
  if (!weights.empty()) {
    const absl::StatusOr<Weights> size = EstimateWeights(loaded.geometry, weights, files);
    if (size.ok()) loaded.weights = *size;
  }
  return loaded;
}

absl::StatusOr<Weights> LoadWeights(const std::string& text, const ModelGeometry& model, WeightFiles files) {
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
  double number = 0;
  if (absl::SimpleAtod(text, &number) && number < 4096) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is no size of weights; with a unit (", text,
                                                   "GB, ", text,
                                                   "GiB), or a quantisation (q4_k_m, q8_0, awq, fp8, bf16)"));
  }
  const absl::StatusOr<int64_t> bytes = ParseBytes(text);
  if (bytes.ok()) return Weights{*bytes, Provenance::kExact, absl::StrCat("given as ", text)};
  return EstimateWeights(model, text, files);
}

}  // namespace kvtide::planner
