// How a call ends that only queues work on a caller's stream.
#pragma once

#include "absl/status/status.h"
#include "kernels/cuda/device/cuda_error.h"

namespace kvtide::cuda {

// `status` of such a call. One that failed leaves nothing behind that still runs, unless the stream is being
// captured, where nothing runs, and no error in the runtime.
inline absl::Status Settled(absl::Status status, cudaStream_t stream) {
  if (status.ok()) return status;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &capture) == cudaSuccess && capture == cudaStreamCaptureStatusNone)
    (void)cudaStreamSynchronize(stream);
  (void)cudaGetLastError();
  return status;
}

}  // namespace kvtide::cuda
