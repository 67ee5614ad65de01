// libFuzzer: any text as config.json; geometry that is accepted can be sized by every engine.
#include <cstddef>
#include <cstdint>
#include <string>

#include "planner/engines/kv_sizer.h"
#include "planner/model/config_json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvtide::planner;
  const std::string text(reinterpret_cast<const char*>(data), size);
  for (bool ignore : {false, true}) {
    const auto model = GeometryFromConfigJson(text, "fuzz", {ignore});
    if (!model.ok()) continue;
    EngineOptions options;
    for (Engine engine : {Engine::kLlamaCpp, Engine::kVllm, Engine::kSglang, Engine::kKvtide}) {
      options.engine = engine;
      const auto sizer = MakeKvSizer(options, *model, GroupLayers(*model), {"f16", "f16"});
      if (sizer.ok()) (*sizer)->Bytes({8192, 2, 0});
    }
  }
  return 0;
}
