#include "daemon/backends.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cpu/cpu_backend.h"
#ifdef KVTIDE_HAVE_CUDA
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
absl::StatusOr<std::unique_ptr<Backend>> MakeGpu(int index) {
  CudaBackendOptions options;
  options.device = std::to_string(index);
  return MakeCudaBackend(options);
}
#else
absl::StatusOr<std::unique_ptr<Backend>> MakeGpu(int) {
  return absl::UnavailableError("this kvtided was built without CUDA");
}
#endif

}  // namespace

absl::StatusOr<Backends> MakeBackends(const std::string& device, int compute_threads) {
  Backends backends;
  if (device == "cpu") {
    backends.device = MakeCpu(compute_threads);
    return backends;
  }
  int index = 0;
  const bool choose = device == "auto";
  if (!choose && (device.compare(0, 5, "cuda:") != 0 || !absl::SimpleAtoi(device.substr(5), &index))) {
    return absl::InvalidArgumentError(
        absl::StrCat("device \"", device, "\" is unknown; use cpu, cuda:0 or auto"));
  }
  auto gpu = MakeGpu(index);
  if (gpu.ok()) {
    backends.device = std::move(gpu).value();
    backends.host = MakeCpu(compute_threads);
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
