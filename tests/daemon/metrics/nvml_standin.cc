// A library with the few functions of NVML that the collector uses, for machines without a GPU: two GPUs, of
// which the second does not tell its utilisation, as MIG instances do not.
#include <cstdint>

namespace {
struct Memory {
  unsigned long long total, free, used;
};
struct Utilization {
  unsigned int gpu, memory;
};
constexpr int kSuccess = 0, kInvalid = 2, kNotSupported = 3;
bool started = false;
}  // namespace

extern "C" {
int nvmlInit_v2() {
  started = true;
  return kSuccess;
}
int nvmlShutdown() {
  started = false;
  return kSuccess;
}
int nvmlDeviceGetCount_v2(unsigned int* count) {
  *count = 2;
  return started ? kSuccess : kInvalid;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void** device) {
  *device = reinterpret_cast<void*>(static_cast<uintptr_t>(index + 1));
  return index < 2 ? kSuccess : kInvalid;
}
int nvmlDeviceGetMemoryInfo(void* device, Memory* memory) {
  const auto number = reinterpret_cast<uintptr_t>(device);
  *memory = {number << 30, (number << 30) - number * 1000, number * 1000};
  return kSuccess;
}
int nvmlDeviceGetUtilizationRates(void* device, Utilization* rates) {
  *rates = {37, 5};
  return reinterpret_cast<uintptr_t>(device) == 1 ? kSuccess : kNotSupported;
}
}
