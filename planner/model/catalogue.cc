#include "planner/model/catalogue.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "planner/csv.h"
#include "planner/embedded.h"
#include "planner/near_names.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

// "5s1F" -> "sssssF".
std::string ExpandKinds(const std::string& unit) {
  std::string kinds;
  int count = 0;
  for (char c : unit) {
    if (absl::ascii_isdigit(static_cast<unsigned char>(c))) {
      count = count * 10 + (c - '0');
    } else {
      kinds.append(static_cast<size_t>(count), c);
      count = 0;
    }
  }
  return kinds;
}

struct ModelRow {
  int64_t layers, n_kv_full, n_kv_swa, head_dim_full, head_dim_swa, window, shared, latent, rope, recurrent;
};

LayerGeometry MakeLayer(char kind, const ModelRow& row, int64_t state_bytes) {
  LayerGeometry layer;
  switch (kind) {
    case 's':
      layer = {LayerKind::kSliding, static_cast<int>(row.n_kv_swa), static_cast<int>(row.head_dim_swa),
               static_cast<int>(row.head_dim_swa), static_cast<int>(row.window)};
      break;
    case 'm':
      layer = {LayerKind::kMla, 1, static_cast<int>(row.latent + row.rope), 0};
      break;
    case 'r':
      layer.kind = LayerKind::kRecurrent;
      layer.state_bytes = state_bytes;
      break;
    default:
      layer = {LayerKind::kFull, static_cast<int>(row.n_kv_full), static_cast<int>(row.head_dim_full),
               static_cast<int>(row.head_dim_full)};
  }
  return layer;
}

// The last `shared` layers read the cache of the last layer of their kind that owns one.
void ShareTail(ModelGeometry& model, int64_t shared) {
  const int owners = static_cast<int>(model.layers.size() - static_cast<size_t>(shared));
  for (int i = owners; i < static_cast<int>(model.layers.size()); ++i) {
    const LayerKind kind = model.layers[i].kind;
    for (int j = owners - 1; j >= 0; --j) {
      if (model.layers[j].kind != kind) continue;
      model.layers[i] = LayerGeometry{};
      model.layers[i].kind = LayerKind::kShared;
      model.layers[i].shared_with = j;
      break;
    }
  }
}

absl::StatusOr<ModelGeometry> ReadModel(const CsvRow& csv) {
  ModelRow row{};
  KVTIDE_ASSIGN_OR_RETURN(row.layers, csv.Integer("layers"));
  KVTIDE_ASSIGN_OR_RETURN(row.n_kv_full, csv.Integer("n_kv_full"));
  KVTIDE_ASSIGN_OR_RETURN(row.n_kv_swa, csv.Integer("n_kv_swa"));
  KVTIDE_ASSIGN_OR_RETURN(row.head_dim_full, csv.Integer("head_dim_full"));
  KVTIDE_ASSIGN_OR_RETURN(row.head_dim_swa, csv.Integer("head_dim_swa"));
  KVTIDE_ASSIGN_OR_RETURN(row.window, csv.Integer("window"));
  KVTIDE_ASSIGN_OR_RETURN(row.shared, csv.Integer("kv_shared_layers"));
  KVTIDE_ASSIGN_OR_RETURN(row.latent, csv.Integer("mla_latent"));
  KVTIDE_ASSIGN_OR_RETURN(row.rope, csv.Integer("mla_rope"));
  KVTIDE_ASSIGN_OR_RETURN(row.recurrent, csv.Integer("recurrent_bytes_per_seq"));
  ModelGeometry model;
  model.name = csv.Text("name");
  model.source = csv.Text("source");
  model.confidence = csv.Text("confidence");
  int64_t heads = 0, experts = 0, used = 0;
  KVTIDE_ASSIGN_OR_RETURN(model.max_context, csv.Integer("max_context"));
  KVTIDE_ASSIGN_OR_RETURN(model.n_embd, csv.Integer("n_embd"));
  KVTIDE_ASSIGN_OR_RETURN(model.n_vocab, csv.Integer("n_vocab"));
  KVTIDE_ASSIGN_OR_RETURN(heads, csv.Integer("n_query_heads"));
  KVTIDE_ASSIGN_OR_RETURN(model.params_total, csv.Integer("params_total"));
  KVTIDE_ASSIGN_OR_RETURN(model.params_active, csv.Integer("params_active"));
  KVTIDE_ASSIGN_OR_RETURN(experts, csv.Integer("n_experts"));
  KVTIDE_ASSIGN_OR_RETURN(used, csv.Integer("n_experts_used"));
  model.n_query_heads = static_cast<int>(heads);
  model.n_experts = static_cast<int>(experts);
  model.n_experts_used = static_cast<int>(used);

  const std::string kinds = ExpandKinds(csv.Text("layer_kinds"));
  if (kinds.empty()) return absl::InvalidArgumentError(absl::StrCat(csv.place(), ": layer_kinds is empty"));
  int64_t recurrent_layers = 0;
  for (int64_t i = 0; i < row.layers; ++i)
    recurrent_layers += kinds[static_cast<size_t>(i) % kinds.size()] == 'r';
  const int64_t state = recurrent_layers > 0 ? row.recurrent / recurrent_layers : 0;
  for (int64_t i = 0; i < row.layers; ++i) {
    model.layers.push_back(MakeLayer(kinds[static_cast<size_t>(i) % kinds.size()], row, state));
  }
  ShareTail(model, row.shared);
  if (model.confidence.substr(0, 4) != "high") {
    model.assumptions.push_back(
        absl::StrCat("catalogue geometry of ", model.name, " is of confidence ", model.confidence));
  }
  KVTIDE_RETURN_IF_ERROR(Annotate(ValidateGeometry(model), csv.place()));
  return model;
}

std::vector<ModelGeometry> ReadModels() {
  absl::StatusOr<std::vector<CsvRow>> rows =
      ParseCsv(kModelsCsv, "models.csv", {"name", "layers", "layer_kinds"});
  KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
  std::vector<ModelGeometry> models;
  for (const CsvRow& row : *rows) {
    absl::StatusOr<ModelGeometry> model = ReadModel(row);
    KVTIDE_CHECK(model.ok(), std::string(model.status().message()));
    models.push_back(*std::move(model));
  }
  return models;
}

absl::StatusOr<DeviceBudget> ReadGpu(const CsvRow& csv) {
  DeviceBudget device;
  device.name = csv.Text("name");
  int64_t driver_mib = 0;
  double vram_gib = 0;
  KVTIDE_ASSIGN_OR_RETURN(vram_gib, csv.Number("vram_gib"));
  KVTIDE_ASSIGN_OR_RETURN(driver_mib, csv.Integer("driver_mib"));
  KVTIDE_ASSIGN_OR_RETURN(device.bandwidth_gb_s, csv.Number("bandwidth_gb_s"));
  KVTIDE_ASSIGN_OR_RETURN(device.pcie_gb_s, csv.Number("pcie_gb_s"));
  device.vram_bytes = static_cast<int64_t>(vram_gib * kGiB);
  if (driver_mib > 0) {
    device.driver_reserve_bytes = device.vram_bytes - driver_mib * kMiB;
  } else {
    device.driver_reserve_bytes = device.vram_bytes / 200;  // 0.5 %, as seen on consumer cards
    device.driver_reserve_is_guess = true;
  }
  return device;
}

std::vector<DeviceBudget> ReadGpus() {
  absl::StatusOr<std::vector<CsvRow>> rows = ParseCsv(kGpusCsv, "gpus.csv", {"name", "vram_gib"});
  KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
  std::vector<DeviceBudget> gpus;
  for (const CsvRow& row : *rows) {
    absl::StatusOr<DeviceBudget> gpu = ReadGpu(row);
    KVTIDE_CHECK(gpu.ok(), std::string(gpu.status().message()));
    gpus.push_back(*std::move(gpu));
  }
  return gpus;
}

template <class T>
std::string NearestIn(const std::vector<T>& entries, const std::string& name) {
  constexpr size_t kListed = 5;
  std::vector<std::string> names;
  for (const T& entry : entries) names.push_back(entry.name);
  return absl::StrJoin(NearNames(name, names, kListed), ", ");
}

double BitsOfQuantisation(const std::string& name) {
  static const std::pair<const char*, double> bits[] = {
      {"q2_k", 2.96},   {"q3_k_m", 3.91}, {"q4_0", 4.5},   {"q4_1", 5.0},    {"q4_k_s", 4.58},
      {"q4_k_m", 4.85}, {"iq4_xs", 4.25}, {"q5_0", 5.5},   {"q5_k_s", 5.54}, {"q5_k_m", 5.69},
      {"q6_k", 6.56},   {"q8_0", 8.5},    {"mxfp4", 4.25}, {"nvfp4", 4.5},   {"awq", 4.25},
      {"gptq", 4.25},   {"int8", 8.0},    {"fp8", 8.0},    {"bf16", 16.0},   {"f16", 16.0},
      {"f32", 32.0}};
  for (const auto& entry : bits) {
    if (name == entry.first) return entry.second;
  }
  return 0;
}

}  // namespace

const std::vector<ModelGeometry>& CatalogueModels() {
  static const std::vector<ModelGeometry> models = ReadModels();
  return models;
}

const std::vector<DeviceBudget>& CatalogueGpus() {
  static const std::vector<DeviceBudget> gpus = ReadGpus();
  return gpus;
}

absl::StatusOr<ModelGeometry> FindModel(const std::string& name) {
  const std::string wanted = NormalName(name);
  for (const ModelGeometry& model : CatalogueModels()) {
    if (NormalName(model.name) == wanted) return model;
  }
  return absl::NotFoundError(absl::StrCat(
      "no model '", name,
      "' in the catalogue, and no file of that name; nearest: ", NearestIn(CatalogueModels(), name)));
}

absl::StatusOr<DeviceBudget> FindGpu(const std::string& name) {
  const std::string wanted = NormalName(name);
  for (const DeviceBudget& gpu : CatalogueGpus()) {
    const std::string have = NormalName(gpu.name);
    if (have == wanted || have == "rtx" + wanted) return gpu;
  }
  return absl::NotFoundError(absl::StrCat("no card '", name,
                                          "' in the catalogue; nearest: ", NearestIn(CatalogueGpus(), name),
                                          "; or give numbers: vram=16GiB,bandwidth=960GB/s"));
}

absl::StatusOr<Weights> EstimateWeights(const ModelGeometry& model, const std::string& quantisation) {
  std::string wanted = absl::AsciiStrToLower(quantisation);
  if (wanted == "fp16") wanted = "f16";
  static const absl::StatusOr<std::vector<CsvRow>> rows =
      ParseCsv(kWeightsCsv, "weights.csv", {"model", "quantisation", "size"});
  KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
  for (const CsvRow& row : *rows) {
    if (NormalName(row.Text("model")) != NormalName(model.name) || row.Text("quantisation") != wanted)
      continue;
    KVTIDE_ASSIGN_OR_RETURN(const int64_t bytes, ParseBytes(row.Text("size")));
    return Weights{bytes, Provenance::kCalibrated,
                   absl::StrCat("published ", wanted, " file of ", model.name, ", ", row.Text("size"))};
  }
  const double bits = BitsOfQuantisation(wanted);
  if (bits == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("unknown weights '", quantisation,
                     "': give a GGUF or safetensors path, a size (14.4GB), or a quantisation "
                     "(q4_0, q4_k_m, q5_k_m, q6_k, q8_0, mxfp4, fp8, bf16, ...)"));
  }
  if (model.params_total <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the number of parameters of ", model.name, " is unknown, so '", quantisation,
                     "' gives no size; give --weights a size (14.4GB) or a path"));
  }
  const auto bytes = static_cast<int64_t>(static_cast<double>(model.params_total) * bits / 8);
  return Weights{bytes, Provenance::kFormula,
                 absl::StrCat(model.params_total, " parameters x ", bits, " bits")};
}

}  // namespace kvtide::planner
