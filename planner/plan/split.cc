#include "planner/plan/split.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "planner/model/weight_size.h"
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
  if (room < 0 || Product(host_kv, request.device.count) > request.device.host_bytes) return std::nullopt;
  std::optional<Split> best;
  StepTraffic step = traffic;
  const int64_t on_host = Share(traffic.kv_bytes, host_kv, candidate.kv_bytes);
  step.kv_bytes = traffic.kv_bytes - on_host;
  step.host_attend_bytes = Product(on_host, request.device.count);
  Split split = MakeSplit(candidate, room, host_kv, "the host attends over its blocks in place");
  split.speed =
      PredictSpeed(request.model, request.device, request.engine, step, request.workload.concurrency);
  KeepFaster(split, &best);
  if (request.device.pcie_gb_s > 0) {
    step = traffic;
    step.pcie_bytes = on_host;
    split = MakeSplit(candidate, room, host_kv, "blocks cross PCIe in every step");
    split.speed =
        PredictSpeed(request.model, request.device, request.engine, step, request.workload.concurrency);
    KeepFaster(split, &best);
  }
  return best;
}

// What a step reads of the experts.
int64_t ActiveExpertBytes(const PlanRequest& request, const StepTraffic& traffic) {
  return std::max<int64_t>(
      0, traffic.weight_bytes - (request.weights.bytes - ExpertBytes(request.model, request.weights.bytes)));
}

// The experts of so many layers in host memory (--n-cpu-moe): attention and the cache stay on the GPU.
std::optional<Split> ExpertsOnHost(const PlanRequest& request, const Candidate& candidate,
                                   const StepTraffic& traffic, int64_t missing) {
  const int64_t layers = static_cast<int64_t>(request.model.layers.size());
  const int64_t per_layer = ExpertBytes(request.model, request.weights.bytes) / layers;
  if (per_layer == 0) return std::nullopt;
  const int64_t off = CeilDiv(missing, per_layer);
  if (off > layers || Product(off, per_layer) > request.device.host_bytes) return std::nullopt;
  StepTraffic step = traffic;
  step.host_weight_bytes = Share(ActiveExpertBytes(request, traffic), off, layers);
  step.weight_bytes -= step.host_weight_bytes;
  step.host_layers = static_cast<int>(off);
  Split split = MakeSplit(
      candidate, candidate.kv_bytes, 0,
      absl::StrCat("the experts of ", off, " of ", layers, " layers on the CPU (--n-cpu-moe ", off, ")"));
  split.device_layers = static_cast<int>(layers);
  split.cpu_expert_layers = static_cast<int>(off);
  split.host_weight_bytes = Product(off, per_layer);
  split.speed =
      PredictSpeed(request.model, request.device, request.engine, step, request.workload.concurrency);
  return split;
}

// Experts on the CPU where that is enough (--n-cpu-moe): attention and the cache stay on the GPU. Else whole
// layers (-ngl), or the cache of all layers in host memory (--no-kv-offload), what is faster. Sizes are those
// of all GPUs together.
std::optional<Split> LlamaCppSplit(const PlanRequest& request, const Candidate& candidate,
                                   const StepTraffic& traffic) {
  const int64_t count = request.device.count;
  const int64_t missing = Product(-candidate.free_bytes, count);
  std::optional<Split> best = ExpertsOnHost(request, candidate, traffic, missing);
  if (best.has_value()) return best;
  const int layers = static_cast<int>(request.model.layers.size());
  const int64_t per_layer = Sum(request.weights.bytes, Product(candidate.kv_bytes, count)) / layers;
  const int64_t off = per_layer > 0 ? CeilDiv(missing, per_layer) : layers + 1;
  if (off < layers && Product(off, per_layer) <= request.device.host_bytes) {
    StepTraffic step = traffic;
    step.host_weight_bytes = Share(traffic.weight_bytes, off, layers);
    step.host_attend_bytes = Share(traffic.kv_bytes, off, layers);
    step.weight_bytes -= step.host_weight_bytes;
    step.kv_bytes -= step.host_attend_bytes;
    step.host_layers = static_cast<int>(off);
    const int64_t host_kv = Share(candidate.kv_bytes, off, layers);
    Split split =
        MakeSplit(candidate, candidate.kv_bytes - host_kv, host_kv,
                  absl::StrCat(off, " of ", layers, " layers run on the CPU (-ngl ", layers - off, ")"));
    split.device_layers = static_cast<int>(layers - off);
    split.host_weight_bytes = Share(request.weights.bytes, off, layers);
    split.speed =
        PredictSpeed(request.model, request.device, request.engine, step, request.workload.concurrency);
    KeepFaster(split, &best);
  }
  if (candidate.free_bytes + candidate.kv_bytes >= 0 && candidate.kv_bytes <= request.device.host_bytes) {
    StepTraffic step = traffic;
    step.host_attend_bytes = traffic.kv_bytes;
    step.kv_bytes = 0;
    Split split =
        MakeSplit(candidate, 0, candidate.kv_bytes, "the whole cache in host memory (--no-kv-offload)");
    split.device_layers = layers;
    split.speed =
        PredictSpeed(request.model, request.device, request.engine, step, request.workload.concurrency);
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
    case Engine::kSglang:
      return std::nullopt;  // they attend on the GPU only
  }
  return std::nullopt;
}

}  // namespace kvtide::planner
