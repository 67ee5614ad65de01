#include "daemon/lost_devices.h"

#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#ifdef KVTIDE_HAVE_CUDA
#include "kernels/cuda/device/cuda_error.h"
#endif

namespace kvtide {
namespace {

// `name`: "cuda:0", as backends are called. Others are never lost.
absl::Status CheckDevice(absl::string_view name) {
  int index = 0;
  if (!absl::ConsumePrefix(&name, "cuda:") || !absl::SimpleAtoi(name, &index)) return absl::OkStatus();
#ifdef KVTIDE_HAVE_CUDA
  return cuda::CheckDevice(index);
#else
  return absl::OkStatus();
#endif
}

}  // namespace

LostDevices FindLostDevices(const Backends& backends) {
  std::vector<std::string> texts;
  for (const auto& device : backends.devices)
    if (const absl::Status status = CheckDevice(device->name()); !status.ok())
      texts.emplace_back(status.message());
  return {absl::StrJoin(texts, "; "), !texts.empty() && texts.size() == backends.devices.size()};
}

}  // namespace kvtide
