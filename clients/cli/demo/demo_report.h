// What `kvtide demo` found, as values and as text. Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "clients/cli/terminal/terminal.h"

namespace kvtide::cli {

struct DemoTier {
  std::string name;
  int64_t capacity_bytes = 0, used_bytes = 0, blocks = 0;
};

// One step after the prompt: what was asked of the daemon and what it did.
struct DemoStep {
  std::string name;
  std::string what;    // one sentence
  int64_t blocks = 0;  // moved or dropped
  int64_t bytes = 0;
  bool checked = false;  // the continuation was compared with that from before the step
  bool same_tokens = false;
};

// A prompt that begins as an earlier one did: the time to its first token with what is cached, and without.
struct DemoReuse {
  int64_t prompt_tokens = 0, shared_tokens = 0;
  double computed_seconds = 0;  // nothing is cached
  struct Way {
    std::string what;  // "same daemon", "after a restart"
    std::string tier;  // where the prefix lay
    int64_t reused_tokens = 0;
    double seconds = 0;
    double perplexity = 0;  // of the new tokens
  };
  std::vector<Way> ways;
  double computed_perplexity = 0;
};

struct DemoReport {
  std::string model, text;
  std::string way;  // to the daemon: "shared memory"
  int64_t parameters = 0;
  int64_t context = 0;
  int64_t device_memory_bytes = 0, host_memory_bytes = 0;
  std::string pair, pair_reason;
  bool pair_measured = false;
  int64_t f16_bytes = 0;      // what the planner says the context takes
  int64_t planned_bytes = 0;  // in the pair
  int64_t stored_bytes = 0;   // what the daemon held after the generation
  int64_t stored_tokens = 0;
  int64_t predicted_bytes = 0;  // what the planner says stored_tokens take; equals stored_bytes
  int64_t f16_bytes_per_token = 0;
  int64_t prompt_tokens = 0, generated_tokens = 0;
  double prompt_tokens_per_second = 0, generated_tokens_per_second = 0;
  double perplexity = 0, f16_perplexity = 0;  // of the prompt; 0 = not measured
  std::string generated;
  std::vector<DemoTier> tiers;  // after the generation
  std::vector<DemoStep> steps;
  DemoReuse reuse;  // no ways: not measured
  int64_t moves = 0, moved_bytes = 0;
  uint64_t seed = 0;

  bool AllSame() const;
};

std::string RenderDemoTable(const DemoReport& report, const Terminal& terminal);
std::string RenderDemoJson(const DemoReport& report);

}  // namespace kvtide::cli
