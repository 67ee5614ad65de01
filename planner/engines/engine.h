// The inference engine that a plan is for, and the settings of it that change bytes. Engines round, pad and
// rewrite in their own ways; each has its arithmetic in a file of its own (llama_cpp.h, vllm.h,
// kvtide_engine.h).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/format/exact_window.h"

namespace kvtide::planner {

enum class Engine { kLlamaCpp, kVllm, kSglang, kKvtide };

const char* EngineName(Engine engine);  // "llama.cpp", "vllm", "sglang", "kvtide"
absl::StatusOr<Engine> ParseEngine(const std::string& name);

// What llama.cpp computes with: kernels of attention differ. HIP has those of CUDA.
enum class LlamaBackend { kCuda, kMetal, kCpu };

// A profile of the model's keys, as `kvtide calibrate` makes it (clients/engine/key_profile.h): coded keys
// lie around its means.
struct CalibratedKeys {
  std::string name;  // of the profile, for people
  std::string text;  // that it was made from, and how much of it; empty and 0 where nobody knows
  int64_t tokens = 0;
  bool transforms = false;  // it has those that tide4 and its lower types need
  bool after_rope = false;  // they are of keys as they are stored, not of keys with RoPE taken back
  int64_t context = 0;      // positions that such transforms were made from; 0 = not known
  bool means = true;        // types that need no transforms may be coded around its means
  bool lowest = true;       // with transforms: tide1 too, for which older profiles have no widths
};

struct EngineOptions {
  Engine engine = Engine::kKvtide;
  // Compute capability of the GPU times ten, which kernels ask for; 0 = unknown. MakePlan sets it by the
  // device.
  int compute_capability = 0;
  // llama.cpp
  // Which build (llama_cpp.h): "newest" is upstream as it is today, and for a pair that no upstream build
  // has, the fork that has it; "b10819" an upstream build by number; "upstream"; a fork by name; "auto" any
  // tree.
  std::string build = "newest";
  LlamaBackend backend = LlamaBackend::kCuda;  // MakePlan sets it by the device
  bool all_quants = false;                     // built with GGML_CUDA_FA_ALL_QUANTS
  int ubatch = 512;
  bool unified = true;         // one cell pool for all sequences (-kvu)
  bool total_context = false;  // a context is llama-server's -c: the tokens of all slots together
  bool split_tensors = false;  // several GPUs work on every layer (-sm tensor) instead of one after the other
  // States that speculative decoding keeps beside the running one of every sequence, to go back to.
  int recurrent_copies = 0;
  bool swa_full = false;
  bool rewrites = true;  // the turboquant tree's silent changes of types
  bool flash_attention = true;
  // vLLM
  int block_tokens = 16;
  int max_batched_tokens = 2048;
  double gpu_memory_utilization = 0.92;  // the default of 0.33
  bool cuda_graphs = true;               // and SGLang
  // SGLang; 0 = what it takes by itself (sglang.h)
  double mem_fraction_static = 0;
  int chunked_prefill = 0;
  int page_tokens = 1;
  double swa_full_tokens_ratio = 0.8;
  int64_t max_total_tokens = 0;
  // Every GPU attends for sequences of its own (data-parallel attention of vLLM and SGLang): caches are not
  // divided, attention weights are copied, experts divided.
  bool dp_attention = false;
  // kvtide
  ExactWindow exact_window;
  std::optional<CalibratedKeys> calibrated_keys;
};

}  // namespace kvtide::planner
