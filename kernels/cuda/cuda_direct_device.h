// The direct way on one NVIDIA GPU: the pool is a slab of another process, mapped by CUDA IPC. Streams are
// cudaStream_t; the device has to be current in all calls on what was made here.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/direct_device.h"

namespace kvtide {

// `device`: index or UUID. NotFound if there is no such device.
absl::StatusOr<std::unique_ptr<DirectDevice>> MakeCudaDirectDevice(const std::string& device = "0");

}  // namespace kvtide
