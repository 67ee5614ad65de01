// Workloads as events of a recording: generated in the shapes of Mooncake's published traces, or read from a
// file in their format.
//
// Source: R. Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025, and its traces
// (github.com/kvcache-ai/Mooncake, FAST25-release/traces): one JSON object a line with timestamp (ms),
// input_length, output_length and hash_ids, a number for each 512 tokens of the prompt that is the same where
// all tokens up to there are.
//
// What the generator keeps of them (workload.cc has the parameters): requests and time, mean and spread of
// prompt lengths, mean answers, how much of the prompts an endless cache would find, the time until what was
// used is used again, and what is shared: one system prompt that everybody has (conversation), many of them
// of very different popularity (tool and agent), documents that are asked about many times beside short
// prompts (synthetic). It does not keep single requests, daily rhythms or bursts.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/trace/trace_file.h"

namespace kvtide {

// Log-normal: half of the values are below the median.
struct Spread {
  double median = 0, sigma = 0;
};

// Sessions of one kind: prompts that begin with a system prompt, and grow turn by turn.
struct SessionKind {
  double share = 1;            // of all sessions
  double turns = 1;            // mean of a geometric distribution, at least 1
  Spread first_tokens;         // of the first turn, without the system prompt
  Spread more_tokens;          // that each further turn adds, beside the last answer
  double answer_tokens = 300;  // mean, exponential
  Spread gap_s;                // from one turn to the next
  int system_prompts = 0;      // so many different ones, the k-th with weight 1 / k^skew
  double skew = 1;
  Spread system_tokens;
  bool grows = true;  // false: each turn is the first one's prompt with another question of more_tokens
};

struct WorkloadShape {
  std::string name;
  std::string what;  // one line for people
  int64_t requests = 0;
  double seconds = 0;
  int64_t most_tokens = 131072;  // of a prompt
  std::vector<SessionKind> kinds;
};

// "conversation", "tool-agent", "synthetic".
std::span<const WorkloadShape> WorkloadShapes();
// NotFound with the known names.
absl::StatusOr<WorkloadShape> FindWorkloadShape(const std::string& name);

struct WorkloadOptions {
  double scale = 1;  // of the number of requests, in the same time
  uint64_t seed = 1;
  uint32_t block_tokens = 512;
  uint64_t token_bytes = 33792;  // Llama 3.1 8B in turbo4/turbo4
};

// Lookups in the order of time, each of the full blocks of one prompt; the same for the same seed.
std::vector<RecordedEvent> MakeWorkload(const WorkloadShape& shape, const WorkloadOptions& options);

// A file in Mooncake's format; blocks have 512 tokens, of which the last one counts only if it is full.
// InvalidArgument names the line. `progress` gets the lines that were read; false ends with Cancelled.
absl::StatusOr<std::vector<RecordedEvent>> ReadMooncakeTrace(const std::string& path, uint64_t token_bytes,
                                                             const std::function<bool(uint64_t)>& progress);

}  // namespace kvtide
