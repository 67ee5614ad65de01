// libFuzzer: a whole captured K/V/Q file (clients/cli/capture/captured_file.h).
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>

#include "clients/cli/capture/captured_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::map<std::string, std::string> metadata;
  const auto layers = kvtide::cli::ParseCapture({reinterpret_cast<const std::byte*>(data), size}, &metadata);
  if (!layers.ok()) return 0;
  // What was accepted lies inside the file.
  for (const auto& layer : *layers) {
    for (const auto* tensor : {&layer.k, &layer.v, &layer.q}) {
      const auto* begin = reinterpret_cast<const uint8_t*>(tensor->bytes.data());
      if (begin < data || begin + tensor->bytes.size() > data + size) __builtin_trap();
    }
  }
  return 0;
}
