// The planner's question and its answer. MakePlan is a pure function: the same request gives the same plan,
// it reads no file, asks no device and keeps no state, so any thread may call it at any time. The bytes of
// the `kvtide` engine come from kernels/format, the same code that sizes the daemon's pools. An unmeasured
// pair is listed but never chosen; the context is never lowered.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/base/cancellation.h"
#include "planner/engines/engine.h"
#include "planner/engines/kv_sizer.h"
#include "planner/engines/support.h"
#include "planner/item.h"
#include "planner/model/device.h"
#include "planner/model/geometry.h"
#include "planner/model/weights.h"
#include "planner/plan/quality.h"
#include "planner/plan/speed.h"
#include "planner/type_pair.h"

namespace kvtide::planner {

// A second model that guesses tokens ahead, on the same device.
struct DraftModel {
  ModelGeometry model;
  Weights weights;
  TypePair pair = {"f16", "f16"};
};

struct Workload {
  // Tokens per sequence, ascending or not; at least one. With EngineOptions::total_context: of all sequences
  // together.
  std::vector<int64_t> contexts;
  int concurrency = 1;               // sequences at once
  int64_t shared_prefix_tokens = 0;  // the first tokens that all sequences have in common
  int64_t mmproj_bytes = 0;
  int64_t draft_bytes = 0;          // a draft model of which only the size is known
  std::optional<DraftModel> draft;  // or one whose cache is counted too
  int mtp_layers = 0;               // next-token prediction layers in use, with a cache of their own
};

struct PlanRequest {
  ModelGeometry model;
  Weights weights;
  DeviceBudget device;
  Workload workload;
  EngineOptions engine;
  std::vector<TypePair> pairs;  // empty: every pair that the engine knows
  std::vector<QualityRow> quality;
  std::optional<double> max_ppl_increase_percent;
  // Rows measured on other models count too (marked as such); otherwise only rows of this model do.
  bool accept_proxy_quality = true;
  // Pairs without a measurement may be chosen, after every measured one.
  bool allow_unmeasured = false;
  int64_t margin_bytes = -1;  // kept free per device; < 0: 3 % of the device, at least 512 MiB
  // The device is a tier of kvtided that holds nothing but cache: no contexts, no compute buffers.
  bool cache_tier_only = false;
  // Looked at between candidates; borrowed.
  const Cancellation* cancellation = nullptr;
};

enum class Verdict { kFits, kFitsWithTiers, kDoesNotFit };
const char* VerdictName(Verdict verdict);

// Why a pair was not chosen.
enum class Rejection {
  kNone,         // chosen
  kMoreHarm,     // fits, but another pair harms less
  kMoreBytes,    // fits with equal harm, but another pair needs fewer bytes
  kTooLarge,     // does not fit the device
  kUnmeasured,   // no quality row
  kOverBudget,   // measured harm above --max-ppl-increase
  kRefused,      // the engine refuses the types or head dims
  kCpuFallback,  // the attention would run on the CPU
};
const char* RejectionName(Rejection rejection);  // a stable word for JSON, CSV and RPC; empty for kNone
const char* RejectionText(Rejection rejection);  // for people

// One pair at one context length. All bytes are per device.
struct Candidate {
  TypePair asked;
  TypePair effective;  // after the engine's silent rewrites
  Support support;
  ItemList items;
  int64_t kv_bytes = 0;     // the cache alone: layers, window, tail, rounding (no recurrent state)
  int64_t total_bytes = 0;  // every item, margin included
  int64_t free_bytes = 0;   // budget - total; negative = missing
  bool fits = false;
  double bits_per_value = 0;  // true bits per K or V value, everything counted
  double ratio_to_f16 = 0;    // f16/f16 bytes of the same engine / kv_bytes
  Harm harm;
  int64_t max_context = 0;      // largest context that fits with the asked concurrency (<= the model's)
  int64_t max_concurrency = 0;  // most sequences of the asked context that fit
  // vllm, sglang: the pool that all memory below the limit makes, as the engine prints it at its start.
  int64_t pool_tokens = 0;
  double pool_concurrency = 0;
  int64_t pool_bytes = 0;  // per device
  Speed speed;
  Rejection rejection = Rejection::kNone;
};

// A cache that does not fit on the device, spread over device and host memory.
struct Split {
  TypePair pair;
  int64_t device_kv_bytes = 0;
  int64_t host_kv_bytes = 0;
  int64_t host_weight_bytes = 0;
  int device_layers = 0;      // llama.cpp: layers left on the GPU; otherwise all
  int cpu_expert_layers = 0;  // llama.cpp: layers whose experts run on the CPU (--n-cpu-moe)
  std::string how;            // "attend in place on the host", "-ngl 22", ...
  Speed speed;
};

struct ContextPlan {
  int64_t context = 0;
  Verdict verdict = Verdict::kDoesNotFit;
  int chosen = -1;  // index into candidates; -1 when no measured pair fits the device
  std::vector<Candidate> candidates;
  std::optional<Split> split;  // set when verdict is kFitsWithTiers
  std::string reason;          // one sentence
  // Sequences that run at once: fewer than asked in an engine that lets the rest wait in its queue.
  int64_t running = 0;
};

struct Plan {
  std::string model_name;
  std::string engine_name;
  int64_t device_budget_bytes = 0;         // per device: total - driver reserve - in use
  int64_t weights_bytes = 0;               // per device
  Verdict verdict = Verdict::kDoesNotFit;  // the worst of contexts
  std::vector<ContextPlan> contexts;
  std::vector<std::string> assumptions;
  std::vector<std::string> notes;
};

// InvalidArgument names the field of the request that makes no sense; Cancelled if the request was.
absl::StatusOr<Plan> MakePlan(const PlanRequest& request);

// The engine's options with what it does on the request's device: backend, compute capability, defaults by
// memory.
EngineOptions EngineOnDevice(const PlanRequest& request);

// The request's geometry as one device holds it: heads divided (vllm, kvtide) or layers divided (llama.cpp).
ModelGeometry PerDeviceGeometry(const PlanRequest& request);

// Whether GPUs hold layers one after another, and so work one after another.
bool SplitsLayers(const PlanRequest& request);

// Whether the engine starts with less room than asked and lets sequences wait.
bool QueuesSequences(Engine engine);

// Next-token prediction layers as a model of their own: layers like the last one that owns a full cache.
ModelGeometry MtpGeometry(const ModelGeometry& model, int layers);

// Name of the exact window in quality rows: "default", "none" or "F+L".
std::string WindowPolicy(const EngineOptions& engine);

// The fraction of the device that is kept free when the request does not say.
int64_t DefaultMarginBytes(int64_t device_bytes);

}  // namespace kvtide::planner
