// libFuzzer: no bytes make the GGUF reader or the geometry rules crash, hang or take absurd memory.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "planner/engines/kv_sizer.h"
#include "planner/model/gguf_geometry.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvtide::planner;
  const auto file = ParseGguf(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!file.ok()) return 0;
  GgufDeviceBytes(*file);
  const auto model = GeometryFromGguf(*file, "fuzz", {true});
  if (!model.ok()) return 0;
  EngineOptions options;
  for (Engine engine : {Engine::kLlamaCpp, Engine::kVllm, Engine::kSglang, Engine::kKvtide}) {
    options.engine = engine;
    const auto sizer = MakeKvSizer(options, *model, GroupLayers(*model), {"f16", "f16"});
    if (sizer.ok()) (*sizer)->Bytes({8192, 2, 0});
  }
  return 0;
}
