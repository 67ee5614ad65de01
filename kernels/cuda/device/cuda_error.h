// CUDA errors as statuses, each consumed where it happens, and what tests need to make every call fail once.
//
// An error is taken out of the runtime (cudaGetLastError) with the call that gave it, so that no later,
// innocent call reports it. After some errors (a kernel's bad access, a broken memory cell) the process can
// do nothing more on the device: these mark it as lost, and every later call says so and what to do.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "absl/status/status.h"

namespace kvtide::cuda {

// ResourceExhausted when memory is short, Unavailable when the current device is lost, else Internal; the
// message names the call.
absl::Status StatusOf(cudaError_t error, const char* what);
// OK, or Unavailable with what made the device unusable and what to do.
absl::Status CheckDevice(int device);
// Whether nothing works on a device any more after this error.
bool IsLastingError(cudaError_t error);

// For tests: the n-th of the runtime calls from now on (1 = the next) is not made and fails; 0 = none.
// Process-wide; costs one relaxed load a call.
inline std::atomic<int64_t> calls_until_fault{0};
inline constexpr cudaError_t kInjectedFault = cudaErrorUnknown;
inline bool FaultIsDue() {
  return calls_until_fault.load(std::memory_order_relaxed) > 0 &&
         calls_until_fault.fetch_sub(1, std::memory_order_relaxed) == 1;
}
// For tests: the device counts as usable again.
void ForgetLostDevice(int device);

}  // namespace kvtide::cuda

// Every call of the runtime that may fail: the error it gave.
#define KVTIDE_CUDA_TRY(call) (::kvtide::cuda::FaultIsDue() ? ::kvtide::cuda::kInjectedFault : (call))

#define KVTIDE_CUDA_RETURN_IF_ERROR(call)                                                    \
  do {                                                                                       \
    const cudaError_t kvtide_error_ = KVTIDE_CUDA_TRY(call);                                 \
    if (kvtide_error_ != cudaSuccess) return ::kvtide::cuda::StatusOf(kvtide_error_, #call); \
  } while (false)
