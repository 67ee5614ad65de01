// The flags that `kvtide plan`, `plan verify` and `fleet` have in common, and the request that they make.
#pragma once

#include <CLI/CLI.hpp>
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
  std::string build = "auto";
  std::string weights;
  std::string pairs = "all";
  std::string max_ppl_increase;
  std::string margin;
  std::string host_memory;
  std::string used;
  std::string mmproj;
  std::string draft;
  std::string exact_window = "default";
  std::vector<std::string> quality_files;
  int gpus = 0;
  int concurrency = 1;
  int64_t shared_prefix = 0;
  int ubatch = 512;
  int block_size = 16;
  int max_batched_tokens = 2048;
  double gpu_memory_utilization = 0.9;
  bool separate_caches = false;
  bool swa_full = false;
  bool no_rewrites = false;
  bool no_flash_attention = false;
  bool enforce_eager = false;
  bool own_quality_only = false;
  bool ignore_unknown_fields = false;
};

void AddPlanFlags(CLI::App& command, PlanFlags* flags);

// Reads the files that the flags name. Errors name the flag.
absl::StatusOr<planner::PlanRequest> MakePlanRequest(const PlanFlags& flags);

// "8192,32768", "32K", "4K..128K" (doubling).
absl::StatusOr<std::vector<int64_t>> ParseContexts(const std::string& text);

}  // namespace kvtide::cli
