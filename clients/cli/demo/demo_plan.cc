#include "clients/cli/demo/demo_plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/format/block_layout.h"
#include "planner/plan/plan.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

planner::ModelGeometry Geometry(const std::string& name, const engine::KvGeometry& g) {
  planner::ModelGeometry model;
  model.name = name;
  model.source = "the model's files";
  for (int l = 0; l < g.layers; ++l) {
    planner::LayerGeometry& layer = model.layers.emplace_back();
    layer.kind = g.window(l) > 0 ? planner::LayerKind::kSliding : planner::LayerKind::kFull;
    layer.n_kv_heads = g.kv_heads;
    layer.head_dim_k = layer.head_dim_v = g.head_dim;
    layer.window = g.window(l);
  }
  model.n_query_heads = g.query_heads;
  return model;
}

}  // namespace

int64_t ExactBlockBytes(const engine::KvGeometry& g) {
  return static_cast<int64_t>(
      BlockLayout({g.layers, g.kv_heads, g.head_dim, g.head_dim}, ExactPair()).block_bytes());
}

absl::StatusOr<DemoPlan> PlanDemo(const std::string& model_name, const engine::KvGeometry& geometry,
                                  int64_t context, int64_t device_bytes, int64_t host_bytes,
                                  const std::string& pair) {
  planner::PlanRequest request;
  request.model = Geometry(model_name, geometry);
  request.device.name = "device tier";
  request.device.vram_bytes = device_bytes;
  request.device.host_bytes = host_bytes;
  request.workload.contexts = {context};
  request.engine.engine = planner::Engine::kKvtide;
  request.quality = planner::BuiltInQuality();
  request.cache_tier_only = true;
  // Two blocks that a chunk of the prompt fills before they are coded, and the tails of two branches.
  request.margin_bytes = 4 * ExactBlockBytes(geometry);
  if (!pair.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(const CachePair asked, ParseCachePair(pair));
    request.pairs = {{Name(asked.k), Name(asked.v)}, {"f16", "f16"}};
  }
  KVTIDE_ASSIGN_OR_RETURN(const planner::Plan plan, planner::MakePlan(request));
  const planner::ContextPlan& answer = plan.contexts.front();
  DemoPlan result;
  result.margin_bytes = request.margin_bytes;
  const planner::Candidate* chosen = answer.chosen >= 0 ? &answer.candidates[answer.chosen] : nullptr;
  for (const planner::Candidate& candidate : answer.candidates) {
    if (candidate.asked == planner::TypePair{"f16", "f16"}) {
      result.f16_bytes = candidate.kv_bytes;
      result.f16_fits = candidate.fits;
    }
    if (!pair.empty() && candidate.asked == request.pairs[0]) chosen = &candidate;
  }
  if (chosen == nullptr) {
    // Nothing measured fits the device tier: the pair that the plan would spread, or the smallest measured
    // one.
    for (const planner::Candidate& candidate : answer.candidates) {
      const bool split = answer.split && candidate.asked == answer.split->pair;
      if (split) chosen = &candidate;
      if (!answer.split && candidate.harm.measured &&
          (chosen == nullptr || candidate.kv_bytes < chosen->kv_bytes)) {
        chosen = &candidate;
      }
    }
  }
  if (chosen == nullptr)
    return absl::FailedPreconditionError(absl::StrCat("no pair is possible: ", answer.reason));
  if (chosen->kv_bytes + result.margin_bytes > device_bytes + host_bytes) {
    return absl::FailedPreconditionError(
        absl::StrCat(context, " tokens in ", chosen->asked.Name(), " take ",
                     planner::FormatBytes(chosen->kv_bytes), ", more than both tiers have (",
                     planner::FormatBytes(device_bytes + host_bytes), "); raise --device-memory"));
  }
  result.pair = chosen->asked.Name();
  result.pair_bytes = chosen->kv_bytes;
  result.fits = chosen->fits;
  result.measured = chosen->harm.measured;
  result.change_percent = chosen->harm.ppl_change_percent;
  result.reason = !pair.empty()  ? "asked for"
                  : chosen->fits ? "least measured harm that fits"
                                 : "spread over both tiers";
  return result;
}

}  // namespace kvtide::cli
