// The story of `kvtide demo`: plan a pair that keeps a long text in a small device tier, run a real model
// over it with its keys and values in a kvtided of its own, generate, fork, park, resume, evict, and check
// that nothing was lost on the way.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "clients/cli/demo/demo_report.h"

namespace kvtide::cli {

struct DemoOptions {
  std::string model_folder;  // empty = the bundled one
  std::string prompt;        // wins over the file
  std::string text_file;     // empty = the bundled one
  int context = 0;           // 0 = 4,096 or what the model can handle
  int generate = 64;
  int64_t device_bytes = 0;                // 0 = half of what f16 needs
  int64_t host_bytes = 0;                  // 0 = three times what f16 needs
  std::string cache_type_k, cache_type_v;  // empty = the planner's choice
  float temperature = 0.8f;                // 0 = greedy
  uint64_t seed = 1;
  bool reuse = true;      // also a prompt that begins as an earlier one did, and a restart
  bool reference = true;  // also f16 in the engine's own memory, for the perplexity
  int threads = 0;
  std::string daemon_program;
  bool narrate = true;  // tell the story on standard output while it happens
  bool show_progress = true;
};

absl::StatusOr<DemoReport> RunDemo(const DemoOptions& options);

}  // namespace kvtide::cli
