// The backend that plays the device in the cache's tests: the CPU, or what KVTIDE_TEST_DEVICE names, such as
// "cuda:0" or "cuda:0,cuda:1" for tests with two devices. A device that is named and cannot be had stops the
// process: a test run that asked for a GPU must not pass without one.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvtide::testing {

// `index`: 0 for the first device, 1 for a second one (the last named device, if there are fewer). `cpu` is
// used when the CPU plays the device.
std::unique_ptr<Backend> MakeDeviceUnderTest(int index, const CpuBackendOptions& cpu);
// Whether it attends over keys that are coded before RoPE by rebuilding them with transforms of 8 bits, which
// for the random transforms of tests are rows as far off as tests/kernels/attend_check.h says; what it
// computes is compared there with keys that are rebuilt so.
bool DeviceRebuildsKeys();

}  // namespace kvtide::testing
