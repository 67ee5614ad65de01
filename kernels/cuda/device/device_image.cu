#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/device/capability.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/device_image.h"

namespace kvtide::cuda {
namespace {

__global__ void Probe() {}  // compiled for the same architectures as all kernels; never launched

std::string Number(int capability) { return absl::StrCat(capability / 10, ".", capability % 10); }

}  // namespace

absl::StatusOr<DeviceImage> FindDeviceImage(int device) {
  const DeviceGuard guard(device);
  int major = 0, minor = 0, shared = 0;
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  KVTIDE_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  DeviceImage image;
  image.capability = 10 * major + minor;
  const auto refuse = [&](const std::string& why) {
    return absl::FailedPreconditionError(absl::StrCat("CUDA device ", device, " has compute capability ",
                                                      Number(image.capability), "; ", why));
  };
  if (image.capability < kOldestCapability)
    return refuse(absl::StrCat(Number(kOldestCapability), " or newer is needed"));
  std::string built;
  for (const int arch : {__CUDA_ARCH_LIST__})
    absl::StrAppend(&built, built.empty() ? "" : ", ", Number(arch / 10));
  const std::string rebuild = absl::StrCat("this build of KVTIDE has code for ", built,
                                           "; build it with CMAKE_CUDA_ARCHITECTURES=", image.capability,
                                           image.capability == 90 ? "a" : "", "-real");
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, Probe);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    (void)cudaGetLastError();  // otherwise the next call would report it
    return refuse(rebuild);
  }
  KVTIDE_CUDA_RETURN_IF_ERROR(error);
  // Of code that the driver compiled from PTX, what it was written for.
  image.image_capability = attributes.ptxVersion;
  image.shared_limit = SharedLimitOf(image.image_capability);
  // Code for 8.0 also starts on an 8.6, which has less shared memory.
  if (image.shared_limit > shared) return refuse(rebuild);
  return image;
}

}  // namespace kvtide::cuda
