// libFuzzer: any text as kvtided's configuration file; what is accepted is accepted with its defaults said,
// too.
#include <cstddef>
#include <cstdint>
#include <string>

#include "daemon/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  auto config = kvtide::ParseConfig(std::string(reinterpret_cast<const char*>(data), size), "fuzz");
  if (!config.ok()) return 0;
  // Names of files that would be opened.
  config->clear_tokens();
  config->clear_server_cert();
  config->clear_server_key();
  config->clear_client_ca();
  const auto options = kvtide::ResolveConfig(*config);
  if (!options.ok()) return 0;
  if (!kvtide::ResolveConfig(kvtide::WithDefaults(*config, *options)).ok()) __builtin_trap();
  return 0;
}
