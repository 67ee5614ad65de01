// libFuzzer: what lies on the disk of a disk tier: see hostile_disk.h.
#include <cstddef>
#include <cstdint>

#include "tests/daemon/disk/hostile_disk.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvtide::PlayHostileDisk({data, size});
  return 0;
}
