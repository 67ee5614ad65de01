// Names and small views of a plan's parts.
#include "absl/strings/str_cat.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

const char* VerdictName(Verdict verdict) {
  switch (verdict) {
    case Verdict::kFits:
      return "fits";
    case Verdict::kFitsWithTiers:
      return "fits_with_tiers";
    case Verdict::kDoesNotFit:
      return "does_not_fit";
  }
  return "unknown";
}

const char* RejectionName(Rejection rejection) {
  switch (rejection) {
    case Rejection::kNone:
      return "";
    case Rejection::kMoreHarm:
      return "more_harm";
    case Rejection::kMoreBytes:
      return "more_bytes";
    case Rejection::kTooLarge:
      return "too_large";
    case Rejection::kUnmeasured:
      return "unmeasured";
    case Rejection::kOverBudget:
      return "over_quality_budget";
    case Rejection::kRefused:
      return "refused";
    case Rejection::kCpuFallback:
      return "cpu_fallback";
  }
  return "unknown";
}

const char* RejectionText(Rejection rejection) {
  switch (rejection) {
    case Rejection::kNone:
      return "";
    case Rejection::kMoreHarm:
      return "more harm";
    case Rejection::kMoreBytes:
      return "no better, not smaller";
    case Rejection::kTooLarge:
      return "too large";
    case Rejection::kUnmeasured:
      return "not measured";
    case Rejection::kOverBudget:
      return "over the quality budget";
    case Rejection::kRefused:
      return "refused by the engine";
    case Rejection::kCpuFallback:
      return "no GPU kernel";
  }
  return "unknown";
}

bool SplitsLayers(const PlanRequest& request) {
  return request.engine.engine == Engine::kLlamaCpp && !request.engine.split_tensors;
}

bool QueuesSequences(Engine engine) { return engine != Engine::kLlamaCpp && engine != Engine::kKvtide; }

ModelGeometry PerDeviceGeometry(const PlanRequest& request) {
  if (request.engine.dp_attention) return request.model;
  if (SplitsLayers(request)) return FullestLayerSlice(request.model, request.device.count);
  return ShardHeads(request.model, request.device.count);
}

ModelGeometry MtpGeometry(const ModelGeometry& model, int layers) {
  ModelGeometry mtp = model;
  mtp.layers.clear();
  mtp.uncounted.clear();
  for (const LayerGeometry& layer : model.layers) {
    if (layer.kind == LayerKind::kFull || layer.kind == LayerKind::kMla)
      mtp.layers.assign(static_cast<size_t>(layers), layer);
  }
  return mtp;
}

std::string WindowPolicy(const EngineOptions& engine) {
  if (engine.engine != Engine::kKvtide) return "none";
  const ExactWindow& window = engine.exact_window;
  if (window == ExactWindow{}) return "default";
  if (window.first_blocks == 0 && window.last_blocks == 0) return "none";
  return absl::StrCat(window.first_blocks, "+", window.last_blocks);
}

}  // namespace kvtide::planner
