#include "planner/engines/engine.h"

#include "absl/strings/str_cat.h"

namespace kvtide::planner {

const char* EngineName(Engine engine) {
  switch (engine) {
    case Engine::kLlamaCpp:
      return "llama.cpp";
    case Engine::kVllm:
      return "vllm";
    case Engine::kKvtide:
      return "kvtide";
  }
  return "unknown";
}

absl::StatusOr<Engine> ParseEngine(const std::string& name) {
  for (Engine engine : {Engine::kLlamaCpp, Engine::kVllm, Engine::kKvtide}) {
    if (name == EngineName(engine)) return engine;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown engine '", name, "'; known: llama.cpp, vllm, kvtide"));
}

}  // namespace kvtide::planner
