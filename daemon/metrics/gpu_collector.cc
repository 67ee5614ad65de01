#include "daemon/metrics/gpu_collector.h"

#include <dlfcn.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/metrics/family.h"

namespace kvtide::metrics {
namespace {

// Of NVML's interface (docs.nvidia.com/deploy/nvml-api), which is stable: what is used here, under its names.
using nvmlDevice_t = void*;
struct nvmlMemory_t {
  unsigned long long total, free, used;
};
struct nvmlUtilization_t {
  unsigned int gpu, memory;  // percent
};
struct nvmlProcessInfo_t {
  unsigned int pid;
  unsigned long long usedGpuMemory;  // all ones where it is not told
  unsigned int gpuInstanceId, computeInstanceId;
};
constexpr int kSuccess = 0;

}  // namespace

struct GpuCollector::Nvml {
  void* library = nullptr;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*count)(unsigned int*) = nullptr;
  int (*handle)(unsigned int, nvmlDevice_t*) = nullptr;
  int (*memory)(nvmlDevice_t, nvmlMemory_t*) = nullptr;
  int (*utilization)(nvmlDevice_t, nvmlUtilization_t*) = nullptr;
  int (*processes)(nvmlDevice_t, unsigned int*, nvmlProcessInfo_t*) = nullptr;  // null: an old driver

  ~Nvml() {
    if (shutdown != nullptr) shutdown();
    if (library != nullptr) ::dlclose(library);
  }
  template <class Function>
  bool Find(const char* name, Function* function) const {
    *function = reinterpret_cast<Function>(::dlsym(library, name));
    return *function != nullptr;
  }
};

GpuCollector::GpuCollector(const std::string& library) {
  auto nvml = std::make_unique<Nvml>();
  nvml->library = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (nvml->library == nullptr) return;
  const bool found = nvml->Find("nvmlInit_v2", &nvml->init) &&
                     nvml->Find("nvmlDeviceGetCount_v2", &nvml->count) &&
                     nvml->Find("nvmlDeviceGetHandleByIndex_v2", &nvml->handle) &&
                     nvml->Find("nvmlDeviceGetMemoryInfo", &nvml->memory) &&
                     nvml->Find("nvmlDeviceGetUtilizationRates", &nvml->utilization);
  if (!found || nvml->init() != kSuccess) return;
  nvml->Find("nvmlShutdown", &nvml->shutdown);
  nvml->Find("nvmlDeviceGetComputeRunningProcesses_v3", &nvml->processes);
  nvml_ = std::move(nvml);
}

GpuCollector::~GpuCollector() = default;

std::optional<int64_t> GpuCollector::BytesOfThisProcess() const {
  unsigned int count = 0;
  if (nvml_ == nullptr || nvml_->processes == nullptr || nvml_->count(&count) != kSuccess)
    return std::nullopt;
  std::optional<int64_t> bytes;
  for (unsigned int i = 0; i < count; i++) {
    nvmlDevice_t device = nullptr;
    std::vector<nvmlProcessInfo_t> processes(256);
    auto size = static_cast<unsigned int>(processes.size());
    if (nvml_->handle(i, &device) != kSuccess ||
        nvml_->processes(device, &size, processes.data()) != kSuccess)
      continue;
    for (unsigned int p = 0; p < size; p++)
      if (processes[p].pid == static_cast<unsigned int>(::getpid()) && processes[p].usedGpuMemory != ~0ULL)
        bytes = bytes.value_or(0) + static_cast<int64_t>(processes[p].usedGpuMemory);
  }
  return bytes;
}

std::vector<prometheus::MetricFamily> GpuCollector::Collect() const {
  std::vector<prometheus::MetricFamily> families;
  unsigned int count = 0;
  if (nvml_ == nullptr || nvml_->count(&count) != kSuccess || count == 0) return families;
  std::vector<nvmlDevice_t> devices(count);
  for (unsigned int i = 0; i < count; i++)
    if (nvml_->handle(i, &devices[i]) != kSuccess) devices[i] = nullptr;
  FamilyWriter writer(&families);
  // A GPU that does not tell one of them (MIG instances have no utilisation) is left out of it.
  const auto each = [&](FamilyWriter& family, auto value) {
    for (unsigned int i = 0; i < count; i++) {
      double number = 0;
      if (devices[i] != nullptr && value(devices[i], &number))
        family.Sample(number, {{"gpu", absl::StrCat(i)}});
    }
  };
  const auto memory = [&](unsigned long long nvmlMemory_t::*field) {
    return [this, field](nvmlDevice_t device, double* number) {
      nvmlMemory_t info{};
      if (nvml_->memory(device, &info) != kSuccess) return false;
      *number = static_cast<double>(info.*field);
      return true;
    };
  };
  const auto utilization = [this](nvmlDevice_t device, double* number) {
    nvmlUtilization_t rates{};
    if (nvml_->utilization(device, &rates) != kSuccess) return false;
    *number = rates.gpu / 100.0;
    return true;
  };
  each(writer.Gauge("kvtide_gpu_memory_bytes", "Memory of the GPU."), memory(&nvmlMemory_t::total));
  each(writer.Gauge("kvtide_gpu_memory_used_bytes", "Memory of the GPU that any process holds."),
       memory(&nvmlMemory_t::used));
  each(writer.Gauge("kvtide_gpu_utilization_ratio",
                    "Share of the time in which any process computed on the GPU."),
       utilization);
  return families;
}

}  // namespace kvtide::metrics
