// A library with the few functions of NVML that the collector uses, for machines without a GPU: two GPUs, of
// which the second does not tell its utilisation, as MIG instances do not.
#include <unistd.h>

#include <cstdint>

namespace {
struct Memory {
  unsigned long long total, free, used;
};
struct Process {
  unsigned int pid;
  unsigned long long memory;
  unsigned int instance, compute_instance;
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
// This process on both, and another one.
int nvmlDeviceGetComputeRunningProcesses_v3(void* device, unsigned int* count, Process* processes) {
  if (*count < 2) return kInvalid;
  *count = 2;
  processes[0] = {1, 7777, 0, 0};
  processes[1] = {static_cast<unsigned int>(::getpid()), 100 * reinterpret_cast<uintptr_t>(device), 0, 0};
  return kSuccess;
}
int nvmlDeviceGetUtilizationRates(void* device, Utilization* rates) {
  *rates = {37, 5};
  return reinterpret_cast<uintptr_t>(device) == 1 ? kSuccess : kNotSupported;
}
}
