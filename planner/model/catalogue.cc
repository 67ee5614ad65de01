#include "planner/model/catalogue.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "planner/csv.h"
#include "planner/embedded.h"
#include "planner/model/key_traits.h"
#include "planner/model/model_name.h"
#include "planner/near_names.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

// One letter per layer: "5s1F" is a unit that repeats, "=2r1F" the whole list.
absl::StatusOr<std::string> ExpandKinds(const CsvRow& csv, const char* column, int64_t layers) {
  const std::string& text = csv.Text(column);
  const bool whole = !text.empty() && text[0] == '=';
  std::string kinds;
  int64_t count = 0;
  for (char c : text.substr(whole ? 1 : 0)) {
    if (absl::ascii_isdigit(static_cast<unsigned char>(c))) {
      count = count * 10 + (c - '0');
    } else {
      kinds.append(static_cast<size_t>(count), c);
      count = 0;
    }
  }
  if (kinds.empty() || (whole && static_cast<int64_t>(kinds.size()) != layers)) {
    return absl::InvalidArgumentError(absl::StrCat(csv.place(), ": ", column, " '", text, "' gives ",
                                                   kinds.size(), " of ", layers, " layers"));
  }
  const size_t unit = kinds.size();
  for (int64_t i = static_cast<int64_t>(unit); i < layers; ++i) kinds += kinds[static_cast<size_t>(i) % unit];
  kinds.resize(static_cast<size_t>(layers));
  return kinds;
}

struct ModelRow {
  int64_t layers, n_kv_full, n_kv_swa, head_dim_full, head_dim_swa, head_dim_v, window, shared, latent, rope,
      index, recurrent, convolution;
};

LayerGeometry MakeLayer(char kind, const ModelRow& row, int64_t recurrent_layers) {
  LayerGeometry layer;
  const auto heads = [&](LayerKind layer_kind, int64_t n, int64_t dim) {
    const int64_t value = row.head_dim_v > 0 ? row.head_dim_v : dim;
    return LayerGeometry{layer_kind, static_cast<int>(n), static_cast<int>(dim), static_cast<int>(value)};
  };
  switch (kind) {
    case 's':
    case 'c':
      layer = heads(kind == 's' ? LayerKind::kSliding : LayerKind::kChunked, row.n_kv_swa, row.head_dim_swa);
      layer.window = static_cast<int>(row.window);
      break;
    case 'm':
      layer = {LayerKind::kMla, 1, static_cast<int>(row.latent + row.rope), 0};
      break;
    case 'w':
    case 'x':
    case 'y':
      layer = CompressedLatent(static_cast<int>(row.latent + row.rope), static_cast<int>(row.window),
                               kind == 'w'   ? 1
                               : kind == 'x' ? 4
                                             : 128,
                               static_cast<int>(row.index));
      break;
    case 'r':
      layer.kind = LayerKind::kRecurrent;
      layer.state_bytes = row.recurrent / recurrent_layers;
      layer.conv_bytes = row.convolution / recurrent_layers;
      break;
    case '-':
      layer.kind = LayerKind::kNone;
      break;
    default:
      layer = heads(LayerKind::kFull, row.n_kv_full, row.head_dim_full);
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
  KVTIDE_ASSIGN_OR_RETURN(row.head_dim_v, csv.Integer("head_dim_v"));
  KVTIDE_ASSIGN_OR_RETURN(row.index, csv.Integer("index_dim"));
  KVTIDE_ASSIGN_OR_RETURN(row.recurrent, csv.Integer("recurrent_bytes_per_seq"));
  KVTIDE_ASSIGN_OR_RETURN(row.convolution, csv.Integer("conv_bytes_per_seq"));
  ModelGeometry model;
  model.name = csv.Text("name");
  model.source = csv.Text("source");
  model.confidence = csv.Text("confidence");
  model.key_traits = KeyTraitsOfFamily(model.name);
  int64_t heads = 0, experts = 0, used = 0, mtp = 0;
  KVTIDE_ASSIGN_OR_RETURN(model.max_context, csv.Integer("max_context"));
  KVTIDE_ASSIGN_OR_RETURN(model.n_embd, csv.Integer("n_embd"));
  KVTIDE_ASSIGN_OR_RETURN(model.n_vocab, csv.Integer("n_vocab"));
  KVTIDE_ASSIGN_OR_RETURN(heads, csv.Integer("n_query_heads"));
  KVTIDE_ASSIGN_OR_RETURN(model.n_ff, csv.Integer("n_ff"));
  KVTIDE_ASSIGN_OR_RETURN(model.params_total, csv.Integer("params_total"));
  KVTIDE_ASSIGN_OR_RETURN(model.params_active, csv.Integer("params_active"));
  KVTIDE_ASSIGN_OR_RETURN(model.params_experts, csv.Integer("params_experts"));
  KVTIDE_ASSIGN_OR_RETURN(model.params_embedding, csv.Integer("params_embedding"));
  KVTIDE_ASSIGN_OR_RETURN(mtp, csv.Integer("mtp_layers"));
  KVTIDE_ASSIGN_OR_RETURN(experts, csv.Integer("n_experts"));
  KVTIDE_ASSIGN_OR_RETURN(used, csv.Integer("n_experts_used"));
  model.n_query_heads = static_cast<int>(heads);
  model.n_experts = static_cast<int>(experts);
  model.n_experts_used = static_cast<int>(used);
  model.mtp_layers = static_cast<int>(mtp);

  if (row.layers < 1 || row.layers > 4096)
    return absl::InvalidArgumentError(absl::StrCat(csv.place(), ": layers is ", row.layers));
  KVTIDE_ASSIGN_OR_RETURN(const std::string kinds, ExpandKinds(csv, "layer_kinds", row.layers));
  std::string index(kinds.size(), '-');
  if (!csv.Text("index_layers").empty()) {
    KVTIDE_ASSIGN_OR_RETURN(index, ExpandKinds(csv, "index_layers", row.layers));
  }
  const int64_t recurrent = std::count(kinds.begin(), kinds.end(), 'r');
  for (size_t i = 0; i < kinds.size(); ++i) {
    model.layers.push_back(MakeLayer(kinds[i], row, recurrent));
    if (index[i] == 'i') model.layers.back().index_dim = static_cast<int>(row.index);
  }
  ShareTail(model, row.shared);
  if (model.confidence.substr(0, 4) != "high") {
    model.assumptions.push_back(absl::StrCat("catalogue geometry of ", model.name, " is of confidence ",
                                             model.confidence, " (", model.source, ")"));
  }
  KVTIDE_RETURN_IF_ERROR(Annotate(ValidateGeometry(model), csv.place()));
  return model;
}

struct NamedModel {
  ModelGeometry model;
  std::vector<std::string> names;  // in NormalName's form; the first is the catalogue's
};

std::vector<NamedModel> ReadModels() {
  absl::StatusOr<std::vector<CsvRow>> rows =
      ParseCsv(kModelsCsv, "models.csv", {"name", "aliases", "layers", "layer_kinds"});
  KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
  std::vector<NamedModel> models;
  for (const CsvRow& row : *rows) {
    absl::StatusOr<ModelGeometry> model = ReadModel(row);
    KVTIDE_CHECK(model.ok(), std::string(model.status().message()));
    NamedModel named;
    named.names.push_back(NormalName(model->name));
    for (const std::string& alias : std::vector<std::string>(absl::StrSplit(row.Text("aliases"), ';')))
      if (!alias.empty()) named.names.push_back(NormalName(alias));
    named.model = *std::move(model);
    models.push_back(std::move(named));
  }
  return models;
}

const std::vector<NamedModel>& NamedModels() {
  static const std::vector<NamedModel> models = ReadModels();
  return models;
}

// Why a model that has a name is not in the catalogue; empty for names that nobody gave.
std::string WhyRefused(const std::vector<std::string>& candidates) {
  static const absl::StatusOr<std::vector<CsvRow>> rows =
      ParseCsv(kRefusedCsv, "refused.csv", {"name", "reason"});
  KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
  for (const std::string& candidate : candidates) {
    for (const CsvRow& row : *rows) {
      if (NormalName(row.Text("name")) == NormalName(candidate))
        return absl::StrCat(row.Text("name"), " cannot be planned: ", row.Text("reason"));
    }
  }
  return "";
}

// Models whose names begin with `prefix`, small ones first.
std::vector<const ModelGeometry*> Family(const std::string& prefix) {
  std::vector<const ModelGeometry*> family;
  for (const NamedModel& named : NamedModels()) {
    if (absl::StartsWith(named.names[0], prefix)) family.push_back(&named.model);
  }
  std::stable_sort(family.begin(), family.end(), [](const ModelGeometry* a, const ModelGeometry* b) {
    const auto size = [](const ModelGeometry* m) {
      return m->params_total > 0 ? m->params_total : INT64_MAX;
    };
    return size(a) < size(b);
  });
  return family;
}

// macOS gives the GPU two thirds of small machines and three quarters of others (recommendedMaxWorkingSetSize
// as users report it).
constexpr int64_t kSmallAppleBytes = 36 * kGiB;

struct NamedDevice {
  DeviceBudget device;
  std::vector<std::string> names;    // in DeviceName's form; the first is the catalogue's
  std::vector<int64_t> sizes_bytes;  // of devices that come in several sizes, small ones first
  bool apple = false;
};

// "NVIDIA GeForce RTX 4090" -> "rtx4090": who makes a card does not tell it from others.
std::string DeviceName(const std::string& text) {
  std::string name = NormalName(text);
  for (const char* maker : {"nvidia", "geforce", "tesla", "amd", "instinct", "radeon", "intel", "apple"}) {
    if (absl::StartsWith(name, maker)) name = name.substr(std::string(maker).size());
  }
  return name;
}

void SetSize(int64_t bytes, NamedDevice* named) {
  DeviceBudget& device = named->device;
  device.vram_bytes = bytes;
  device.driver_reserve_is_guess = true;
  if (named->apple) {
    device.driver_reserve_bytes = bytes <= kSmallAppleBytes ? bytes / 3 : bytes / 4;
  } else {
    device.driver_reserve_bytes = device.memory == DeviceMemory::kHost ? 0 : bytes / 200;  // 0.5 %
    device.driver_reserve_is_guess = device.driver_reserve_bytes > 0;
  }
}

absl::StatusOr<NamedDevice> ReadGpu(const CsvRow& csv) {
  NamedDevice named;
  DeviceBudget& device = named.device;
  device.name = csv.Text("name");
  int64_t driver_mib = 0;
  double vram_gib = 0;
  KVTIDE_ASSIGN_OR_RETURN(vram_gib, csv.Number("vram_gib"));
  KVTIDE_ASSIGN_OR_RETURN(driver_mib, csv.Integer("driver_mib"));
  KVTIDE_ASSIGN_OR_RETURN(device.bandwidth_gb_s, csv.Number("bandwidth_gb_s"));
  KVTIDE_ASSIGN_OR_RETURN(device.pcie_gb_s, csv.Number("pcie_gb_s"));
  device.arch = csv.Text("arch");
  const std::string memory = csv.Text("memory");
  named.apple = memory == "apple";
  if (memory == "unified" || named.apple) device.memory = DeviceMemory::kUnified;
  if (memory == "cpu") device.memory = DeviceMemory::kHost;
  SetSize(static_cast<int64_t>(vram_gib * kGiB), &named);
  if (driver_mib > 0) {
    // Some cards have more than their name says.
    device.vram_bytes = std::max(device.vram_bytes, driver_mib * kMiB);
    device.driver_reserve_bytes = device.vram_bytes - driver_mib * kMiB;
    device.driver_reserve_is_guess = false;
  }
  for (const std::string& size : std::vector<std::string>(absl::StrSplit(csv.Text("sizes_gib"), ';'))) {
    int64_t gib = 0;
    if (!size.empty() && absl::SimpleAtoi(size, &gib)) named.sizes_bytes.push_back(gib * kGiB);
  }
  named.names.push_back(DeviceName(device.name));
  for (const std::string& alias : std::vector<std::string>(absl::StrSplit(csv.Text("aliases"), ';')))
    if (!alias.empty()) named.names.push_back(DeviceName(alias));
  return named;
}

std::vector<NamedDevice> ReadGpus() {
  absl::StatusOr<std::vector<CsvRow>> rows =
      ParseCsv(kGpusCsv, "gpus.csv", {"name", "vram_gib", "arch", "memory"});
  KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
  std::vector<NamedDevice> gpus;
  for (const CsvRow& row : *rows) {
    absl::StatusOr<NamedDevice> gpu = ReadGpu(row);
    KVTIDE_CHECK(gpu.ok(), std::string(gpu.status().message()));
    gpus.push_back(*std::move(gpu));
  }
  return gpus;
}

const std::vector<NamedDevice>& NamedDevices() {
  static const std::vector<NamedDevice> devices = ReadGpus();
  return devices;
}

std::string SizeName(int64_t bytes) { return absl::StrCat(bytes / kGiB, "GB"); }

// "M4 Max 64GB" -> "M4 Max" and 64 GiB.
bool SplitSize(const std::string& text, std::string* before, int64_t* bytes) {
  const std::string name = absl::AsciiStrToLower(absl::StripAsciiWhitespace(text));
  size_t end = name.size();
  for (const char* unit : {"gib", "gb", "g"}) {
    if (!absl::EndsWith(name, unit)) continue;
    end -= std::string(unit).size();
    break;
  }
  while (end > 0 && end < name.size() && name[end - 1] == ' ') --end;
  size_t begin = end;
  while (begin > 0 && absl::ascii_isdigit(static_cast<unsigned char>(name[begin - 1]))) --begin;
  int64_t gib = 0;
  if (end == name.size() || begin == 0 || !absl::SimpleAtoi(name.substr(begin, end - begin), &gib) ||
      gib > 65536)
    return false;
  const char separator = name[begin - 1];
  if (separator != ' ' && separator != '-' && separator != '_' && separator != '(') return false;
  *before = name.substr(0, begin - 1);
  *bytes = gib * kGiB;
  return true;
}

const NamedDevice* FindExactly(const std::string& wanted, const std::string** as) {
  for (const NamedDevice& named : NamedDevices()) {
    for (const std::string& name : named.names) {
      if (name != wanted && name != "rtx" + wanted) continue;
      *as = &name;
      return &named;
    }
  }
  return nullptr;
}

// Devices whose names begin alike, in order of memory, then of bandwidth.
std::vector<const DeviceBudget*> DeviceFamily(const std::string& prefix) {
  std::vector<const DeviceBudget*> family;
  for (const NamedDevice& named : NamedDevices()) {
    for (const std::string& name : named.names) {
      if (!absl::StartsWith(name, prefix) && !absl::StartsWith(name, "rtx" + prefix)) continue;
      family.push_back(&named.device);
      break;
    }
  }
  std::stable_sort(family.begin(), family.end(), [](const DeviceBudget* a, const DeviceBudget* b) {
    return std::pair(a->vram_bytes, a->bandwidth_gb_s) < std::pair(b->vram_bytes, b->bandwidth_gb_s);
  });
  return family;
}

// A device that comes in several sizes, and the size that was asked (0 = none).
absl::StatusOr<DeviceBudget> WithSize(const NamedDevice& named, int64_t bytes, const std::string& asked) {
  const auto names = [&] {
    return absl::StrJoin(named.sizes_bytes, ", ", [&](std::string* out, int64_t size) {
      absl::StrAppend(out, named.device.name, " ", SizeName(size));
    });
  };
  if (bytes == 0 && !named.sizes_bytes.empty()) {
    return absl::NotFoundError(absl::StrCat("'", asked, "' comes in several sizes; which: ", names(),
                                            "; for example --device '", named.device.name, " ",
                                            SizeName(named.sizes_bytes.front()), "'"));
  }
  if (bytes == 0) return named.device;
  if (named.sizes_bytes.empty()) {
    // "RTX 3090 24GB": the size that it has.
    const int64_t difference = std::abs(named.device.vram_bytes - bytes);
    if (difference <= named.device.vram_bytes / 20) return named.device;
    return absl::NotFoundError(absl::StrCat("'", asked, "': ", named.device.name, " has ",
                                            FormatBytes(named.device.vram_bytes),
                                            "; for another size give numbers: vram=16GiB,bandwidth=960GB/s"));
  }
  if (std::find(named.sizes_bytes.begin(), named.sizes_bytes.end(), bytes) == named.sizes_bytes.end())
    return absl::NotFoundError(absl::StrCat("'", asked, "': the sizes are ", names()));
  NamedDevice sized = named;
  SetSize(bytes, &sized);
  sized.device.name = absl::StrCat(named.device.name, " ", SizeName(bytes));
  if (named.apple)
    sized.device.assumption =
        absl::StrCat("macOS gives the GPU ", FormatBytes(sized.device.UsableBytes()), " of ", SizeName(bytes),
                     " unless iogpu.wired_limit_mb says otherwise");
  return sized.device;
}

template <class T>
std::string NearestIn(const std::vector<T>& entries, const std::string& name) {
  constexpr size_t kListed = 6;
  std::vector<std::string> names;
  for (const T& entry : entries) names.push_back(entry.name);
  return absl::StrJoin(NearNames(name, names, kListed), ", ");
}

}  // namespace

const std::vector<ModelGeometry>& CatalogueModels() {
  static const std::vector<ModelGeometry> models = [] {
    std::vector<ModelGeometry> list;
    for (const NamedModel& named : NamedModels()) list.push_back(named.model);
    return list;
  }();
  return models;
}

const std::vector<DeviceBudget>& CatalogueGpus() {
  static const std::vector<DeviceBudget> gpus = [] {
    std::vector<DeviceBudget> list;
    for (const NamedDevice& named : NamedDevices()) list.push_back(named.device);
    return list;
  }();
  return gpus;
}

absl::StatusOr<ModelGeometry> FindModel(const std::string& name) {
  const std::vector<std::string> candidates = ReadModelName(name).candidates;
  for (const std::string& candidate : candidates) {
    const std::string wanted = NormalName(candidate);
    for (const NamedModel& named : NamedModels()) {
      const auto found = std::find(named.names.begin(), named.names.end(), wanted);
      if (found == named.names.end()) continue;
      ModelGeometry model = named.model;
      if (found != named.names.begin())
        model.assumptions.push_back(absl::StrCat("'", candidate, "' has the shape of ", model.name));
      return model;
    }
  }
  const std::string refused = WhyRefused(candidates);
  const std::string near = NearestIn(CatalogueModels(), candidates.back());
  if (!refused.empty())
    return absl::UnimplementedError(
        absl::StrCat(refused, "; give --model a config.json or GGUF file; nearest: ", near));
  const std::vector<const ModelGeometry*> family = Family(NormalName(candidates.back()));
  if (family.size() == 1) return *family[0];
  if (!family.empty()) {
    const std::string sizes = absl::StrJoin(family, ", ", [](std::string* out, const ModelGeometry* model) {
      absl::StrAppend(out, model->name);
    });
    return absl::NotFoundError(absl::StrCat("'", name, "' is a family; which of it: ", sizes,
                                            "; for example --model ", family[0]->name));
  }
  return absl::NotFoundError(
      absl::StrCat("no model '", name, "' in the catalogue, and no file of that name; nearest: ", near));
}

absl::StatusOr<DeviceBudget> FindGpu(const std::string& name) {
  const std::string wanted = DeviceName(name);
  const std::string* as = nullptr;
  const NamedDevice* named = FindExactly(wanted, &as);
  int64_t bytes = 0;
  std::string before;
  if (named == nullptr && SplitSize(name, &before, &bytes)) named = FindExactly(DeviceName(before), &as);
  if (named != nullptr) {
    KVTIDE_ASSIGN_OR_RETURN(DeviceBudget device, WithSize(*named, bytes, name));
    // A bare name that several devices have.
    std::vector<std::string> others;
    for (const DeviceBudget* other : DeviceFamily(*as)) {
      const bool longer = DeviceName(other->name) != named->names[0] && *as != named->names[0];
      if (longer && other->vram_bytes == named->device.vram_bytes) others.push_back(other->name);
    }
    if (!others.empty())
      device.assumption = absl::StrCat("'", name, "' is taken as ", device.name, "; there is also ",
                                       absl::StrJoin(others, ", "));
    return device;
  }
  const std::vector<const DeviceBudget*> family = DeviceFamily(wanted);
  if (!family.empty() && wanted.size() >= 2) {
    return absl::NotFoundError(absl::StrCat(
        "'", name, "' is several devices; which of them: ",
        absl::StrJoin(family, ", ",
                      [](std::string* out, const DeviceBudget* device) {
                        absl::StrAppend(out, device->name, " (", FormatBytes(device->UsableBytes()), ")");
                      }),
        "; for example --device '", family[0]->name, "'"));
  }
  return absl::NotFoundError(absl::StrCat("no card '", name,
                                          "' in the catalogue; nearest: ", NearestIn(CatalogueGpus(), name),
                                          "; or give numbers: vram=16GiB,bandwidth=960GB/s"));
}

}  // namespace kvtide::planner
