// The flags that `kvtide plan`, `plan verify` and `fleet` have in common, and the request that they make.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/plan/plan.h"

namespace kvtide::cli {

struct PlanFlags {
  std::string model;
  std::string contexts = "8192,32768,131072";
  std::string device = "auto";
  std::string engine = "kvtide";
  std::string build = "newest";
  bool all_quants = false;
  std::string split_mode = "layer";
  int64_t ctx_size = 0;                    // llama-server's -c; 0 = --context speaks
  int parallel = 0;                        // llama-server's -np; 0 = its default of four slots
  bool kv_unified = false;                 // llama-server's -kvu
  std::string cache_type_k, cache_type_v;  // llama-server's -ctk and -ctv
  std::string flash_attention = "on";
  int recurrent_copies = 0;
  int mtp = 0;
  std::string draft_weights;
  std::string draft_pair = "f16/f16";
  bool allow_unmeasured = false;
  std::string weights;
  std::string pairs = "all";
  std::string max_ppl_increase;
  std::string margin;
  std::string host_memory;
  std::string used;
  std::string mmproj;
  std::string draft;
  std::string exact_window = "default";
  std::string profile;  // of the model's keys, as `kvtide calibrate` writes it
  std::vector<std::string> quality_files;
  int gpus = 0;
  int concurrency = 1;
  int64_t shared_prefix = 0;
  int ubatch = 512;
  int block_size = 16;
  int max_batched_tokens = 0;  // 0 = vLLM's default for the device
  double gpu_memory_utilization = 0.92;
  bool separate_caches = false;
  bool swa_full = false;
  bool no_rewrites = false;
  bool enforce_eager = false;
  bool dp_attention = false;
  // SGLang; 0 = what it takes by itself
  double mem_fraction_static = 0;
  int chunked_prefill = 0;
  int page_size = 1;
  double swa_full_tokens_ratio = 0.8;
  int64_t max_total_tokens = 0;
  // Whether an option stood on the command line; empty where there is none.
  std::function<bool(const char*)> given;
  bool own_quality_only = false;
  bool ignore_unknown_fields = false;
};

void AddPlanFlags(CLI::App& command, PlanFlags* flags);

// The arguments with llama-server's words of one dash (-np 4 -kvu -ctk q8_0) and settings of ollama and
// llama-server (num_ctx=8192, OLLAMA_KV_CACHE_TYPE=q8_0) as the long options that they stand for, in the
// order that CLI::App::parse takes: last first. Other commands than plan and fleet keep theirs.
std::vector<std::string> WithEngineWords(int argc, char** argv);

// Reads the files that the flags name. Errors name the flag.
absl::StatusOr<planner::PlanRequest> MakePlanRequest(const PlanFlags& flags);

// "1%" or "1": a percentage of 0 or more.
absl::StatusOr<double> ParsePercent(const std::string& text);

// "8192,32768", "32K", "4K..128K" (doubling).
absl::StatusOr<std::vector<int64_t>> ParseContexts(const std::string& text);

}  // namespace kvtide::cli
