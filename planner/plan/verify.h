// Prediction against reality: reads the start-up log of llama.cpp, vLLM or SGLang, or the metrics of a
// running kvtided, and puts what they say beside the items of a plan.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

// What a log says, per device (the fullest one). Keys: weights, kv, recurrent, compute, graphs, context,
// kv_per_request; kv_host for a cache in host memory beside a GPU; draft_weights, draft_kv, draft_recurrent
// and draft_compute for a second model or context in the same log.
struct Measured {
  std::string kind;  // "llama.cpp log", "vllm log", "sglang log", "kvtided metrics"
  std::map<std::string, int64_t> bytes;
  bool on_cpu = false;             // llama.cpp without a GPU: everything lies in host memory
  std::vector<std::string> notes;  // what the log has and no plan counts
  // sglang: the pool that the engine made of all memory that it had. A request's part of it: PerRequest.
  int64_t pool_bytes = 0;
  int64_t pool_tokens = 0;
};

// InvalidArgument when the text has no line that is understood.
absl::StatusOr<Measured> ParseLlamaLog(const std::string& log);
absl::StatusOr<Measured> ParseVllmLog(const std::string& log);
absl::StatusOr<Measured> ParseSglangLog(const std::string& log);
// Prometheus text of kvtided: bytes of blocks in use per tier.
absl::StatusOr<Measured> ParseKvtidedMetrics(const std::string& text);
// Whichever of them fits.
absl::StatusOr<Measured> ParseAnyLog(const std::string& text);

// Of a pool that is larger than asked: what one request of `context` tokens takes, as kv_per_request.
void PerRequest(int64_t context, Measured* measured);

struct VerifyLine {
  std::string item;
  int64_t predicted = 0;
  int64_t actual = 0;
  double ErrorPercent() const;  // (predicted - actual) / actual
};

// One line per item that both sides have, and a sum. `candidate` is the pair that ran, `split` what the plan
// puts into host memory of it, if anything.
std::vector<VerifyLine> Compare(const Candidate& candidate, const std::optional<Split>& split,
                                int64_t sequences, const Measured& measured);

// Whether every item is as predicted, within `percent` of the actual bytes or 4 MiB.
bool WithinTolerance(const std::vector<VerifyLine>& lines, double percent);

std::string RenderVerify(const std::vector<VerifyLine>& lines, const Measured& measured);

}  // namespace kvtide::planner
