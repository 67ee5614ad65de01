// The messages of a client that shares memory and sends what it likes: see hostile_messages.h.
#include <cstddef>
#include <cstdint>

#include "tests/daemon/service/hostile_messages.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvtide::service::PlayHostileMessages({data, size});
  return 0;
}
