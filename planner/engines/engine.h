// The inference engine that a plan is for, and the settings of it that change bytes. Engines round, pad and
// rewrite in their own ways; each has its arithmetic in a file of its own (llama_cpp.h, vllm.h,
// kvtide_engine.h).
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "kernels/format/exact_window.h"

namespace kvtide::planner {

enum class Engine { kLlamaCpp, kVllm, kKvtide };

const char* EngineName(Engine engine);  // "llama.cpp", "vllm", "kvtide"
absl::StatusOr<Engine> ParseEngine(const std::string& name);

struct EngineOptions {
  Engine engine = Engine::kKvtide;
  // llama.cpp
  std::string build =
      "auto";  // auto, upstream, turboquant, pairquant: which tree; auto = the first that has the types
  int ubatch = 512;
  bool unified = true;  // one cell pool for all sequences (-kvu)
  bool swa_full = false;
  bool rewrites = true;  // the turboquant tree's silent changes of types
  bool flash_attention = true;
  // vLLM
  int block_tokens = 16;
  int max_batched_tokens = 2048;
  double gpu_memory_utilization = 0.9;
  bool cuda_graphs = true;
  // kvtide
  ExactWindow exact_window;
};

}  // namespace kvtide::planner
