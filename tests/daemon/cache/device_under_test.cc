#include "tests/daemon/cache/device_under_test.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "kernels/base/check.h"
#ifdef KVTIDE_HAVE_CUDA
#include "kernels/cuda/cuda_backend.h"
#endif

namespace kvtide::testing {

std::unique_ptr<Backend> MakeDeviceUnderTest(int index, const CpuBackendOptions& cpu) {
  const char* const text = std::getenv("KVTIDE_TEST_DEVICE");
  if (text == nullptr || *text == 0) return MakeCpuBackend(cpu);
  const std::vector<std::string> devices = absl::StrSplit(text, ',');
  const std::string device = devices[std::min(static_cast<size_t>(index), devices.size() - 1)];
  if (device == "cpu") return MakeCpuBackend(cpu);
#ifdef KVTIDE_HAVE_CUDA
  KVTIDE_CHECK(absl::StartsWith(device, "cuda:"), "KVTIDE_TEST_DEVICE: unknown device ", device);
  CudaBackendOptions options;
  options.device = device.substr(5);
  options.scratch_bytes = size_t{16} << 20;
  auto backend = MakeCudaBackend(options);
  KVTIDE_CHECK(backend.ok(), "KVTIDE_TEST_DEVICE=", text, ": ", std::string(backend.status().message()));
  return std::move(backend).value();
#else
  KVTIDE_CHECK(false, "KVTIDE_TEST_DEVICE=", text, ": the tests were built without CUDA");
  return nullptr;
#endif
}

bool DeviceRebuildsKeys() {
  const char* const text = std::getenv("KVTIDE_TEST_DEVICE");
  return text != nullptr && absl::StartsWith(text, "cuda:");
}

}  // namespace kvtide::testing
