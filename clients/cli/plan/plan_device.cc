#include "clients/cli/plan/plan_device.h"

#include <dlfcn.h>

#include <algorithm>
#include <fstream>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status.h"
#include "planner/model/catalogue.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

// The few NVML calls that are needed, declared as nvml.h has them (stable ABI since driver 450).
struct NvmlMemory {
  unsigned long long total, free, used;
};
using NvmlDevice = void*;
constexpr unsigned kNvmlClockMemory = 2;

class Nvml {
 public:
  static absl::StatusOr<std::unique_ptr<Nvml>> Open() {
    auto nvml = std::unique_ptr<Nvml>(new Nvml());
    nvml->library_ = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (nvml->library_ == nullptr) {
      return absl::NotFoundError(
          "no NVIDIA driver (libnvidia-ml.so.1) on this machine; name a card or give "
          "vram=16GiB,bandwidth=960GB/s");
    }
    const auto init = nvml->Find<int (*)()>("nvmlInit_v2");
    if (init == nullptr || init() != 0)
      return absl::UnavailableError("NVML does not start (driver not loaded?)");
    nvml->started_ = true;
    return nvml;
  }
  ~Nvml() {
    if (started_) {
      if (const auto stop = Find<int (*)()>("nvmlShutdown")) stop();
    }
    if (library_ != nullptr) dlclose(library_);
  }

  // nullptr when the library lacks the call.
  template <class F>
  F Find(const char* name) const {
    return reinterpret_cast<F>(dlsym(library_, name));
  }

  // A call `int f(device, unsigned*)`; 0 when it fails.
  unsigned Number(const char* name, NvmlDevice device) const {
    unsigned value = 0;
    const auto call = Find<int (*)(NvmlDevice, unsigned*)>(name);
    return call != nullptr && call(device, &value) == 0 ? value : 0;
  }

 private:
  Nvml() = default;
  void* library_ = nullptr;
  bool started_ = false;
};

// "NVIDIA GeForce RTX 5080" is the catalogue's "RTX 5080"; nullptr when it does not have the card.
const planner::DeviceBudget* InCatalogue(const std::string& nvml_name, int64_t vram_bytes) {
  const planner::DeviceBudget* found = nullptr;
  size_t best = 0;
  for (const planner::DeviceBudget& gpu : planner::CatalogueGpus()) {
    const std::string card =
        gpu.name.substr(0, gpu.name.find_last_of(' ') == std::string::npos || !absl::EndsWith(gpu.name, "GB")
                               ? std::string::npos
                               : gpu.name.find_last_of(' '));
    const bool same_size = vram_bytes > gpu.vram_bytes * 9 / 10 && vram_bytes < gpu.vram_bytes * 11 / 10;
    if (absl::StrContains(nvml_name, card) && same_size && card.size() > best)
      best = card.size(), found = &gpu;
  }
  return found;
}

double PcieGbS(unsigned generation, unsigned lanes) {
  if (generation == 0 || lanes == 0) return 0;
  double per_lane = 0.25;  // generation 1
  for (unsigned g = 1; g < std::min(generation, 7u); ++g) per_lane *= 2;
  return per_lane * lanes;
}

absl::StatusOr<planner::DeviceBudget> ReadDevice(const Nvml& nvml, unsigned index) {
  const auto by_index = nvml.Find<int (*)(unsigned, NvmlDevice*)>("nvmlDeviceGetHandleByIndex_v2");
  const auto memory_of = nvml.Find<int (*)(NvmlDevice, NvmlMemory*)>("nvmlDeviceGetMemoryInfo");
  const auto name_of = nvml.Find<int (*)(NvmlDevice, char*, unsigned)>("nvmlDeviceGetName");
  NvmlDevice device = nullptr;
  NvmlMemory memory{};
  char name[128] = "GPU";
  if (by_index == nullptr || memory_of == nullptr || by_index(index, &device) != 0 ||
      memory_of(device, &memory) != 0) {
    return absl::NotFoundError("the NVIDIA driver shows no GPU");
  }
  if (name_of != nullptr) name_of(device, name, sizeof(name) - 1);
  planner::DeviceBudget budget;
  budget.name = name;
  budget.vram_bytes = static_cast<int64_t>(memory.total);
  budget.in_use_bytes = static_cast<int64_t>(memory.used);
  const planner::DeviceBudget* known = InCatalogue(budget.name, budget.vram_bytes);
  if (known != nullptr) budget.bandwidth_gb_s = known->bandwidth_gb_s, budget.arch = known->arch;
  int major = 0, minor = 0;
  const auto capability = nvml.Find<int (*)(NvmlDevice, int*, int*)>("nvmlDeviceGetCudaComputeCapability");
  if (capability != nullptr && capability(device, &major, &minor) == 0 && major > 0)
    budget.arch = absl::StrCat("sm_", major, minor);
  if (budget.bandwidth_gb_s == 0) {
    unsigned clock_mhz = 0;
    const auto clock = nvml.Find<int (*)(NvmlDevice, unsigned, unsigned*)>("nvmlDeviceGetMaxClockInfo");
    if (clock != nullptr) clock(device, kNvmlClockMemory, &clock_mhz);
    // Two transfers per clock as NVML counts it.
    budget.bandwidth_gb_s = 2.0 * clock_mhz * nvml.Number("nvmlDeviceGetMemoryBusWidth", device) / 8 / 1000;
  }
  budget.pcie_gb_s = PcieGbS(nvml.Number("nvmlDeviceGetMaxPcieLinkGeneration", device),
                             nvml.Number("nvmlDeviceGetMaxPcieLinkWidth", device));
  return budget;
}

}  // namespace

absl::StatusOr<std::vector<planner::DeviceBudget>> DetectDevices() {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<Nvml> nvml, Nvml::Open());
  unsigned count = 1;  // a library without the call has at least one GPU, or none, which ReadDevice says
  const auto count_of = nvml->Find<int (*)(unsigned*)>("nvmlDeviceGetCount_v2");
  if (count_of != nullptr && count_of(&count) != 0) count = 1;
  std::vector<planner::DeviceBudget> devices;
  for (unsigned i = 0; i < std::max(count, 1u); i++) {
    KVTIDE_ASSIGN_OR_RETURN(planner::DeviceBudget device, ReadDevice(*nvml, i));
    devices.push_back(std::move(device));
  }
  return devices;
}

bool IsAutomatic(const std::string& device) {
  return absl::StartsWith(device, "auto") && (device.size() == 4 || device[4] == ',' || device[4] == ':');
}

absl::StatusOr<planner::DeviceBudget> DetectDevice(const std::string& text) {
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<planner::DeviceBudget> devices, DetectDevices());
  const size_t comma = std::min(text.find(','), text.size());
  const std::string changes = text.substr(comma), chosen = text.substr(0, comma);
  planner::DeviceBudget device = *std::min_element(
      devices.begin(), devices.end(), [](const planner::DeviceBudget& a, const planner::DeviceBudget& b) {
        return a.UsableBytes() < b.UsableBytes();
      });
  if (chosen != "auto") {
    size_t index = 0;
    if (!absl::SimpleAtoi(chosen.substr(5), &index) || index >= devices.size())
      return absl::NotFoundError(
          absl::StrCat("no GPU '", chosen.substr(5), "'; this machine has ", devices.size()));
    device = devices[index];
  }
  if (changes.empty()) return device;
  // The same syntax as for a named card, with what was detected in front.
  const std::string name = device.name, arch = device.arch;
  KVTIDE_ASSIGN_OR_RETURN(
      device, planner::ParseDevice(absl::StrFormat(
                  "vram=%dB,used=%dB,bandwidth=%.3f,pcie=%.3f%s", device.vram_bytes, device.in_use_bytes,
                  std::max(device.bandwidth_gb_s, 1.0), std::max(device.pcie_gb_s, 1.0), changes)));
  device.name = name;
  device.arch = arch;
  return device;
}

int64_t AvailableHostBytes() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  int64_t kib = 0;
  while (file >> key >> kib && std::getline(file, unit)) {
    if (key == "MemAvailable:") return kib * planner::kKiB;
  }
  return 0;
}

}  // namespace kvtide::cli
