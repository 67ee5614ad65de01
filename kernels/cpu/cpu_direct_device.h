// The direct way on the CPU: pools in memory files, attention by threads of the engine's process. Streams are
// ignored; calls return when their work is done.
#pragma once

#include <memory>

#include "kernels/direct_device.h"

namespace kvtide {

// `threads`: that attend; 0 = one for each processor.
std::unique_ptr<DirectDevice> MakeCpuDirectDevice(int threads = 0);

}  // namespace kvtide
