// A driver library with one H200, for the test of `--device auto`. Declarations follow nvml.h.
#include <cstdio>

extern "C" {

struct Memory {
  unsigned long long total, free, used;
};

int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  static int card;
  *device = &card;
  return index == 0 ? 0 : 6;
}
int nvmlDeviceGetMemoryInfo(void*, Memory* memory) {
  *memory = {150754820096ull, 150754820096ull - (1ull << 30), 1ull << 30};
  return 0;
}
int nvmlDeviceGetName(void*, char* name, unsigned length) {
  std::snprintf(name, length, "NVIDIA H200");
  return 0;
}
int nvmlDeviceGetMaxPcieLinkGeneration(void*, unsigned* value) {
  *value = 5;
  return 0;
}
int nvmlDeviceGetMaxPcieLinkWidth(void*, unsigned* value) {
  *value = 16;
  return 0;
}

}  // extern "C"
