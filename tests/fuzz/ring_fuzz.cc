// The shared memory of a client that writes what it likes: see hostile_ring.h.
#include <cstddef>
#include <cstdint>

#include "tests/daemon/ring/hostile_ring.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvtide::ring::PlayHostileRing({data, size});
  return 0;
}
