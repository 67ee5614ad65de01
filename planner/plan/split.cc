#include "planner/plan/split.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

void KeepFaster(const Split& split, std::optional<Split>* best) {
  if (!best->has_value() || split.speed.tokens_per_s > (*best)->speed.tokens_per_s) *best = split;
}

Split MakeSplit(const Candidate& candidate, int64_t device_kv, int64_t host_kv, std::string how) {
  Split split;
  split.pair = candidate.asked;
  split.device_kv_bytes = device_kv;
  split.host_kv_bytes = host_kv;
  split.how = std::move(how);
  return split;
}

int64_t Share(int64_t bytes, int64_t part, int64_t whole) {
  return static_cast<int64_t>(static_cast<double>(bytes) * static_cast<double>(part) /
                              static_cast<double>(whole));
}

// Blocks that do not fit stay on the host and are attended there, or cross PCIe in every step.
std::optional<Split> KvtideSplit(const PlanRequest& request, const Candidate& candidate,
                                 const StepTraffic& traffic) {
  const int64_t room = candidate.free_bytes + candidate.kv_bytes;  // for KV on the device
  const int64_t host_kv = candidate.kv_bytes - room;
  if (room < 0 || host_kv * request.device.count > request.device.host_bytes) return std::nullopt;
  std::optional<Split> best;
  StepTraffic step = traffic;
  const int64_t on_host = Share(traffic.kv_bytes, host_kv, candidate.kv_bytes);
  step.kv_bytes = traffic.kv_bytes - on_host;
  step.host_attend_bytes = on_host * request.device.count;
  Split split = MakeSplit(candidate, room, host_kv, "the host attends over its blocks in place");
  split.speed = PredictSpeed(request.model, request.device, step, request.workload.concurrency);
  KeepFaster(split, &best);
  if (request.device.pcie_gb_s > 0) {
    step = traffic;
    step.pcie_bytes = on_host;
    split = MakeSplit(candidate, room, host_kv, "blocks cross PCIe in every step");
    split.speed = PredictSpeed(request.model, request.device, step, request.workload.concurrency);
    KeepFaster(split, &best);
  }
  return best;
}

// Whole layers on the CPU (-ngl), or the cache of all layers in host memory (--no-kv-offload).
std::optional<Split> LlamaCppSplit(const PlanRequest& request, const Candidate& candidate,
                                   const StepTraffic& traffic) {
  std::optional<Split> best;
  const int layers = static_cast<int>(request.model.layers.size());
  const int64_t weights = request.weights.bytes / request.device.count;
  const int64_t per_layer = (weights + candidate.kv_bytes) / layers;
  const int64_t missing = -candidate.free_bytes;
  const int64_t off = per_layer > 0 ? (missing + per_layer - 1) / per_layer : layers + 1;
  if (off < layers && off * per_layer <= request.device.host_bytes) {
    StepTraffic step = traffic;
    step.host_weight_bytes = Share(traffic.weight_bytes, off, layers);
    step.host_attend_bytes = Share(traffic.kv_bytes, off, layers);
    step.weight_bytes -= step.host_weight_bytes;
    step.kv_bytes -= step.host_attend_bytes;
    const int64_t host_kv = Share(candidate.kv_bytes, off, layers);
    Split split =
        MakeSplit(candidate, candidate.kv_bytes - host_kv, host_kv,
                  absl::StrCat(off, " of ", layers, " layers run on the CPU (-ngl ", layers - off, ")"));
    split.device_layers = static_cast<int>(layers - off);
    split.speed = PredictSpeed(request.model, request.device, step, request.workload.concurrency);
    KeepFaster(split, &best);
  }
  if (candidate.free_bytes + candidate.kv_bytes >= 0 && candidate.kv_bytes <= request.device.host_bytes) {
    StepTraffic step = traffic;
    step.host_attend_bytes = traffic.kv_bytes;
    step.kv_bytes = 0;
    Split split =
        MakeSplit(candidate, 0, candidate.kv_bytes, "the whole cache in host memory (--no-kv-offload)");
    split.device_layers = layers;
    split.speed = PredictSpeed(request.model, request.device, step, request.workload.concurrency);
    KeepFaster(split, &best);
  }
  return best;
}

}  // namespace

std::optional<Split> BestSplit(const PlanRequest& request, const Candidate& candidate,
                               const StepTraffic& traffic) {
  if (request.device.host_bytes <= 0 || candidate.fits) return std::nullopt;
  switch (request.engine.engine) {
    case Engine::kKvtide:
      return KvtideSplit(request, candidate, traffic);
    case Engine::kLlamaCpp:
      return LlamaCppSplit(request, candidate, traffic);
    case Engine::kVllm:
      return std::nullopt;  // vLLM attends on the GPU only
  }
  return std::nullopt;
}

}  // namespace kvtide::planner
