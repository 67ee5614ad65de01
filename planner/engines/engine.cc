#include "planner/engines/engine.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace kvtide::planner {

const char* EngineName(Engine engine) {
  switch (engine) {
    case Engine::kLlamaCpp:
      return "llama.cpp";
    case Engine::kVllm:
      return "vllm";
    case Engine::kSglang:
      return "sglang";
    case Engine::kKvtide:
      return "kvtide";
  }
  return "unknown";
}

absl::StatusOr<Engine> ParseEngine(const std::string& text) {
  const std::string name = absl::AsciiStrToLower(text);
  for (Engine engine : {Engine::kLlamaCpp, Engine::kVllm, Engine::kSglang, Engine::kKvtide}) {
    if (name == EngineName(engine)) return engine;
  }
  // Programs around llama.cpp.
  for (const char* other : {"llamacpp", "llama-server", "llama", "ollama", "lm-studio", "lmstudio"}) {
    if (name == other) return Engine::kLlamaCpp;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "unknown engine '", text, "'; known: llama.cpp (also ollama, llama-server), vllm, sglang, kvtide"));
}

}  // namespace kvtide::planner
