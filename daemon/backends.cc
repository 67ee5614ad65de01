#include "daemon/backends.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cpu/cpu_backend.h"
#ifdef KVTIDE_HAVE_CUDA
#include "daemon/pinned_backend.h"
#include "kernels/cuda/cuda_backend.h"
#endif

namespace kvtide {
namespace {

std::unique_ptr<Backend> MakeCpu(int threads) {
  CpuBackendOptions options;
  options.threads = threads;
  return MakeCpuBackend(options);
}

#ifdef KVTIDE_HAVE_CUDA
absl::StatusOr<std::unique_ptr<Backend>> MakeGpu(const std::string& device) {
  CudaBackendOptions options;
  options.device = device;
  return MakeCudaBackend(options);
}
std::unique_ptr<Backend> MakeHost(int threads) { return MakePinnedBackend(MakeCpu(threads)); }
#else
absl::StatusOr<std::unique_ptr<Backend>> MakeGpu(const std::string&) {
  return absl::UnavailableError("this kvtided was built without CUDA");
}
std::unique_ptr<Backend> MakeHost(int threads) { return MakeCpu(threads); }
#endif

}  // namespace

absl::StatusOr<Backends> MakeBackends(const std::string& device, int compute_threads) {
  Backends backends;
  if (device == "cpu") {
    backends.device = MakeCpu(compute_threads);
    return backends;
  }
  const bool choose = device == "auto";
  const std::string prefix = "cuda:";
  if (!choose && (device.compare(0, prefix.size(), prefix) != 0 || device.size() == prefix.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("device \"", device, "\" is unknown; use cpu, cuda:0 or auto"));
  }
  auto gpu = MakeGpu(choose ? "0" : device.substr(prefix.size()));
  if (gpu.ok()) {
    backends.device = std::move(gpu).value();
    backends.host = MakeHost(compute_threads);
    return backends;
  }
  if (!choose)
    return Annotate(gpu.status(), absl::StrCat("device ", device, " (device cpu works everywhere)"));
  backends.device = MakeCpu(compute_threads);
  backends.note = absl::StrCat("no GPU is used: ", std::string(gpu.status().message()));
  return backends;
}

std::string KnownBackends() {
#ifdef KVTIDE_HAVE_CUDA
  return "cpu, cuda";
#else
  return "cpu";
#endif
}

}  // namespace kvtide
