#include "daemon/backends.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_direct_device.h"
#ifdef KVTIDE_HAVE_CUDA
#include "daemon/pinned_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_direct_device.h"
#endif

namespace kvtide {
namespace {

using Sharing = CpuBackendOptions::Sharing;

std::unique_ptr<Backend> MakeCpu(const std::string& name, int threads, Sharing sharing = Sharing::kNone) {
  CpuBackendOptions options;
  options.sharing = sharing;
  options.name = name;
  options.threads = threads;
  return MakeCpuBackend(options);
}

#ifdef KVTIDE_HAVE_CUDA
absl::StatusOr<std::unique_ptr<Backend>> MakeGpu(const std::string& device, const PoolSharing& sharing) {
  CudaBackendOptions options;
  options.device = device;
  options.sharing = sharing.gpu == "descriptors" ? SlabSharing::kDescriptors
                    : sharing.gpu == "auto"      ? SlabSharing::kAuto
                                                 : SlabSharing::kIpc;
  return MakeCudaBackend(options);
}
absl::StatusOr<int> CountGpus() { return CountCudaDevices(); }
std::unique_ptr<Backend> MakeHost(int threads, Sharing sharing) {
  return MakePinnedBackend(MakeCpu("cpu", threads, sharing));
}
absl::StatusOr<std::shared_ptr<void>> PinForGpus(std::byte* data, size_t bytes) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<PinnedRange> range, PinnedRange::Make(data, bytes));
  return std::shared_ptr<void>(std::move(range));
}
#else
absl::StatusOr<std::unique_ptr<Backend>> MakeGpu(const std::string&, const PoolSharing&) {
  return absl::UnavailableError("this kvtided was built without CUDA");
}
absl::StatusOr<int> CountGpus() { return absl::UnavailableError("this kvtided was built without CUDA"); }
std::unique_ptr<Backend> MakeHost(int threads, Sharing sharing) { return MakeCpu("cpu", threads, sharing); }
absl::StatusOr<std::shared_ptr<void>> PinForGpus(std::byte*, size_t) { return std::shared_ptr<void>(); }
#endif

constexpr char kCuda[] = "cuda:";

absl::StatusOr<std::vector<std::string>> ExpandAll(const std::vector<std::string>& devices) {
  std::vector<std::string> expanded;
  for (const std::string& device : devices) {
    if (device != "cuda:all") {
      expanded.push_back(device);
      continue;
    }
    const auto gpus = CountGpus();
    if (!gpus.ok()) return Annotate(gpus.status(), "device cuda:all (device cpu works everywhere)");
    for (int i = 0; i < *gpus; i++) expanded.push_back(absl::StrCat(kCuda, i));
  }
  return expanded;
}

absl::Status AddGpu(const std::string& device, const PoolSharing& sharing, Backends* backends) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<Backend> gpu, MakeGpu(device, sharing));
  for (const auto& other : backends->devices)
    if (other->name() == gpu->name())
      return absl::InvalidArgumentError(absl::StrCat(gpu->name(), " is named twice"));
  backends->devices.push_back(std::move(gpu));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Backends> MakeBackends(const std::vector<std::string>& devices, int compute_threads,
                                      const PoolSharing& sharing) {
  Backends backends;
  const Sharing of_devices = sharing.cpu ? Sharing::kWrite : Sharing::kNone;
  const Sharing of_host = sharing.host ? Sharing::kRead : Sharing::kNone;
  if (devices.size() == 1 && devices[0] == "auto") {
    const absl::Status status = AddGpu("0", sharing, &backends);
    if (status.ok()) {
      backends.host = MakeHost(compute_threads, of_host);
    } else {
      backends.devices.push_back(MakeCpu("cpu", compute_threads, of_devices));
      backends.cpu_devices = 1;
      if (sharing.host) backends.host = MakeCpu("cpu", compute_threads, of_host);
      backends.note = absl::StrCat("no GPU is used: ", std::string(status.message()));
    }
    return backends;
  }
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<std::string> names, ExpandAll(devices));
  const auto cpus = static_cast<int>(std::count(names.begin(), names.end(), "cpu"));
  const int threads = compute_threads > 0
                          ? compute_threads
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  for (const std::string& name : names) {
    if (name == "cpu") {
      const std::string numbered = cpus > 1 ? absl::StrCat("cpu:", backends.cpu_devices) : "cpu";
      backends.devices.push_back(
          MakeCpu(numbered, cpus > 1 ? std::max(1, threads / cpus) : compute_threads, of_devices));
      backends.cpu_devices++;
    } else {
      KVTIDE_RETURN_IF_ERROR(Annotate(AddGpu(name.substr(sizeof(kCuda) - 1), sharing, &backends),
                                      absl::StrCat("device ", name, " (device cpu works everywhere)")));
    }
  }
  if (backends.cpu_devices < static_cast<int>(backends.devices.size())) {
    backends.host = MakeHost(compute_threads, of_host);
  } else if (sharing.host) {
    backends.host = MakeCpu("cpu", compute_threads, of_host);
  }
  return backends;
}

absl::StatusOr<std::shared_ptr<void>> Backends::Pin(std::byte* data, size_t bytes) const {
  if (cpu_devices == static_cast<int>(devices.size())) return std::shared_ptr<void>();
  return PinForGpus(data, bytes);
}

absl::StatusOr<std::unique_ptr<DirectDevice>> MakeDirectDevice(const std::string& device, int threads) {
  if (device == "cpu") return MakeCpuDirectDevice(threads);
  if (!absl::StartsWith(device, kCuda))
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", device, "\" is no device on which an engine computes: cuda:0, cuda:GPU-... or cpu"));
#ifdef KVTIDE_HAVE_CUDA
  return MakeCudaDirectDevice(device.substr(sizeof(kCuda) - 1));
#else
  return absl::UnavailableError("this build has no CUDA");
#endif
}

std::string KnownBackends() {
#ifdef KVTIDE_HAVE_CUDA
  return "cpu, cuda";
#else
  return "cpu";
#endif
}

}  // namespace kvtide
