// A driver library with one H200, or as many as KVTIDE_FAKE_GPUS says, for the tests of `--device auto`; the
// last of several has 100 GiB in use. Declarations follow nvml.h.
#include <cstdio>
#include <cstdlib>

extern "C" {

struct Memory {
  unsigned long long total, free, used;
};

static int cards[16];

int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) {
  const char* text = std::getenv("KVTIDE_FAKE_GPUS");
  *count = text != nullptr ? static_cast<unsigned>(std::atoi(text)) : 1;
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  unsigned count = 0;
  nvmlDeviceGetCount_v2(&count);
  if (index >= count) return 6;
  *device = &cards[index];
  return 0;
}
int nvmlDeviceGetMemoryInfo(void* device, Memory* memory) {
  unsigned count = 0;
  nvmlDeviceGetCount_v2(&count);
  const unsigned long long used = (count > 1 && device == &cards[count - 1] ? 100ull : 1ull) << 30;
  *memory = {150754820096ull, 150754820096ull - used, used};
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
