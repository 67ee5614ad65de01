#include "kernels/cuda/device/cuda_error.h"

#include <array>
#include <string>

#include "absl/strings/str_cat.h"

namespace kvtide::cuda {
namespace {

constexpr int kMostDevices = 64;
// By device: the error that ended it, or cudaSuccess.
std::array<std::atomic<cudaError_t>, kMostDevices> lost_by{};

std::string Lost(int device, cudaError_t error) {
  return absl::StrCat(
      "CUDA device ", device, " is lost to this process: ", cudaGetErrorString(error),
      ". What lay in its memory is gone; restart the process, and look at the driver's log (dmesg, "
      "Xid) if it happens again");
}

}  // namespace

bool IsLastingError(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContextIsDestroyed:
    case cudaErrorExternalDevice:
      return true;
    default:
      return false;
  }
}

absl::Status StatusOf(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();  // or the next call would report it
  if (error == cudaErrorMemoryAllocation)
    return absl::ResourceExhaustedError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
  if (!IsLastingError(error)) return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) (void)cudaGetLastError();
  if (device >= 0 && device < kMostDevices) lost_by[static_cast<size_t>(device)] = error;
  return absl::UnavailableError(absl::StrCat(what, ": ", Lost(device, error)));
}

absl::Status CheckDevice(int device) {
  if (device < 0 || device >= kMostDevices) return absl::OkStatus();
  const cudaError_t error = lost_by[static_cast<size_t>(device)].load(std::memory_order_relaxed);
  return error == cudaSuccess ? absl::OkStatus() : absl::UnavailableError(Lost(device, error));
}

void ForgetLostDevice(int device) { lost_by[static_cast<size_t>(device)] = cudaSuccess; }

}  // namespace kvtide::cuda
