// libFuzzer: the first 8 bytes as length, the rest as header and as index of a safetensors file.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "planner/model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvtide::planner;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  ParseSafetensorsLength(bytes).status().IgnoreError();
  const std::string_view json = bytes.substr(std::min<size_t>(8, size));
  ParseSafetensorsHeader(json, -1).status().IgnoreError();
  ParseSafetensorsHeader(json, 4096).status().IgnoreError();
  return 0;
}
