// The verb Plan: the planner's arithmetic with this daemon's tiers as the default memory.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/service/handlers.h"
#include "kernels/base/status.h"
#include "planner/plan/plan.h"

namespace kvtide::service {
namespace {

planner::ModelGeometry ToGeometry(const ModelSpec& spec) {
  planner::ModelGeometry geometry;
  geometry.name = spec.name;
  geometry.source = "registered with kvtided";
  geometry.confidence = "high";
  for (const LayerSpec& layer : spec.layers) {
    const LayerGroupSpec& group = spec.groups[static_cast<size_t>(layer.group)];
    planner::LayerGeometry out;
    out.kind = group.window > 0 ? planner::LayerKind::kSliding : planner::LayerKind::kFull;
    out.n_kv_heads = group.shape.kv_heads;
    out.head_dim_k = group.shape.head_dim_k;
    out.head_dim_v = group.shape.head_dim_v;
    out.window = static_cast<int>(group.window);
    geometry.layers.push_back(out);
    geometry.n_query_heads = group.heads;
  }
  return geometry;
}

// The profile of a model: its means are as registered, its transforms those of `newest`, as sequences have
// them that need a profile (KvCache::NewestModel).
absl::StatusOr<planner::CalibratedKeys> CalibratedKeysOf(const ModelSpec& spec, const ModelSpec& newest) {
  planner::CalibratedKeys keys;
  keys.name = absl::StrCat("the profile of model '", spec.name, "'");
  keys.transforms = true;
  for (const LayerGroupSpec& group : spec.groups) keys.means = keys.means && !group.key_means.empty();
  for (const LayerGroupSpec& group : newest.groups) {
    keys.transforms = keys.transforms && !group.key_transforms.empty();
    keys.after_rope = !group.key_transforms.empty() && group.key_transforms.frequencies.empty();
    keys.lowest = keys.lowest && HasWidthsOf(CalibratedTypes().back(), group.shape, group.key_transforms);
  }
  if (keys.means || keys.transforms) return keys;
  return absl::InvalidArgumentError(
      absl::StrCat("key_centring: model '", spec.name,
                   "' has no calibrated means of keys; register it with Layer.key_mean, or install a profile "
                   "(kvtide calibrate makes both)"));
}

v1::PlanVerdict ToProto(planner::Verdict verdict) {
  switch (verdict) {
    case planner::Verdict::kFits:
      return v1::PLAN_VERDICT_FITS;
    case planner::Verdict::kFitsWithTiers:
      return v1::PLAN_VERDICT_FITS_WITH_TIERS;
    case planner::Verdict::kDoesNotFit:
      return v1::PLAN_VERDICT_DOES_NOT_FIT;
  }
  return v1::PLAN_VERDICT_UNSPECIFIED;
}

void ToProto(const planner::Candidate& candidate, v1::PlanCandidate* proto) {
  proto->set_pair(candidate.asked.Name());
  proto->set_kv_bytes(candidate.kv_bytes);
  proto->set_total_bytes(candidate.total_bytes);
  proto->set_free_bytes(candidate.free_bytes);
  proto->set_fits(candidate.fits);
  proto->set_bits_per_value(candidate.bits_per_value);
  proto->set_ratio_to_f16(candidate.ratio_to_f16);
  proto->set_measured(candidate.harm.measured);
  proto->set_perplexity_increase_percent(candidate.harm.ppl_change_percent);
  proto->set_measured_model(candidate.harm.model);
  proto->set_measured_text(candidate.harm.text);
  proto->set_measured_tokens(candidate.harm.tokens);
  proto->set_calibrated(candidate.harm.calibrated);
  proto->set_max_context(candidate.max_context);
  proto->set_max_concurrency(candidate.max_concurrency);
  if (candidate.rejection != planner::Rejection::kNone) {
    proto->set_rejection(planner::RejectionName(candidate.rejection));
  }
}

void ToProto(const planner::ContextPlan& plan, v1::ContextPlan* proto) {
  proto->set_context(plan.context);
  proto->set_verdict(ToProto(plan.verdict));
  if (plan.chosen >= 0) {
    proto->set_chosen_pair(plan.candidates[static_cast<size_t>(plan.chosen)].asked.Name());
  }
  proto->set_reason(plan.reason);
  for (const planner::Candidate& candidate : plan.candidates) ToProto(candidate, proto->add_candidates());
  if (plan.split) {
    proto->set_split_pair(plan.split->pair.Name());
    proto->set_split_device_bytes(plan.split->device_kv_bytes);
    proto->set_split_host_bytes(plan.split->host_kv_bytes);
  }
}

// What a plan costs grows with all three. The most takes about half a second.
absl::Status CheckPlanWork(const v1::PlanRequest& request, const planner::ModelGeometry& model) {
  constexpr int64_t kMostWork = 1 << 20;
  const auto types = static_cast<int64_t>(AllCacheTypes().size());
  const int64_t contexts = request.contexts_size();
  const int64_t pairs = request.pairs_size() > 0 ? request.pairs_size() : types * types;
  const auto groups = static_cast<int64_t>(planner::GroupLayers(model).size());
  if (contexts * pairs * groups <= kMostWork) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(contexts, " contexts x ", pairs, " pairs x ", groups,
                                                 " layer groups are more than ", kMostWork,
                                                 ", the most for one call; ask in several"));
}

}  // namespace

absl::Status Handlers::Plan(const v1::PlanRequest& request, v1::PlanResponse* response, const Call& call) {
  constexpr int kMostContexts = 256, kMostPairs = 1024;
  if (request.contexts_size() > kMostContexts || request.pairs_size() > kMostPairs) {
    return absl::InvalidArgumentError(absl::StrCat("at most ", kMostContexts, " contexts and ", kMostPairs,
                                                   " pairs are planned in one call"));
  }
  if (request.device_bytes() < 0 || request.host_bytes() < 0 || request.weights_bytes() < 0 ||
      request.concurrency() < 0) {
    return absl::InvalidArgumentError(
        "device_bytes, host_bytes, weights_bytes and concurrency are not negative");
  }
  planner::PlanRequest question;
  const bool calibrated = request.key_centring() == v1::KEY_CENTRING_CALIBRATED;
  const auto ask_about = [&](const ModelSpec& spec, const ModelSpec& newest) -> absl::Status {
    question.model = ToGeometry(spec);
    if (calibrated) {
      KVTIDE_ASSIGN_OR_RETURN(question.engine.calibrated_keys, CalibratedKeysOf(spec, newest));
    }
    return absl::OkStatus();
  };
  if (request.model_source_case() == v1::PlanRequest::kModelName) {
    KVTIDE_ASSIGN_OR_RETURN(const ModelId model, cache_->FindModel(request.model_name(), call.context));
    KVTIDE_ASSIGN_OR_RETURN(const SpecPointer spec, SpecOfModel(model));
    ModelSpec newest;
    if (calibrated) {
      KVTIDE_ASSIGN_OR_RETURN(newest, cache_->NewestModel(model));
    }
    KVTIDE_RETURN_IF_ERROR(ask_about(*spec, newest));
  } else {
    auto spec = FromProto(request.model());
    if (!spec.ok()) return Annotate(spec.status(), "model");
    KVTIDE_RETURN_IF_ERROR(ask_about(*spec, *spec));
  }
  KVTIDE_RETURN_IF_ERROR(CheckPlanWork(request, question.model));
  const std::vector<TierOptions>& tiers = cache_->options().tiers;
  const bool own_memory = request.device_bytes() == 0;
  question.device.name = own_memory ? absl::StrCat("tier ", tiers[0].name) : "as asked";
  question.device.vram_bytes =
      own_memory ? static_cast<int64_t>(tiers[0].capacity_bytes) : request.device_bytes();
  // Types without GPU kernels are attended by the CPU backend as all others.
  if (tiers[0].backend->name() == "cpu") question.device.memory = planner::DeviceMemory::kHost;
  question.device.host_bytes = request.host_bytes();
  // Sequences live on one device each, so a plan is about one device and its part of the rest.
  const auto devices = static_cast<size_t>(CountHomes(tiers));
  const int share = own_memory ? static_cast<int>(devices) : 1;
  if (request.host_bytes() == 0 && devices < tiers.size()) {
    question.device.host_bytes = static_cast<int64_t>(tiers[devices].capacity_bytes) / share;
  }
  question.weights.bytes = request.weights_bytes();
  question.weights.source = "request";
  question.workload.contexts.assign(request.contexts().begin(), request.contexts().end());
  question.workload.concurrency = (std::max(1, request.concurrency()) + share - 1) / share;
  question.engine.engine = planner::Engine::kKvtide;
  question.engine.exact_window = options_.defaults.exact_window;
  if (request.has_exact_window()) {
    KVTIDE_ASSIGN_OR_RETURN(question.engine.exact_window, FromProto(request.exact_window()));
  }
  for (const std::string& pair : request.pairs()) {
    auto parsed = ParseCachePair(pair);
    if (!parsed.ok()) return Annotate(parsed.status(), "pairs");
    question.pairs.push_back({Name(parsed->k), Name(parsed->v)});
  }
  question.quality = planner::BuiltInQuality();
  if (request.has_max_perplexity_increase_percent()) {
    question.max_ppl_increase_percent = request.max_perplexity_increase_percent();
  }
  // The daemon's own tier holds nothing but the cache.
  if (request.has_margin_bytes()) {
    question.margin_bytes = request.margin_bytes();
  } else if (own_memory) {
    question.margin_bytes = 0;
  }
  question.cache_tier_only = own_memory;
  question.cancellation = call.context.cancellation;
  KVTIDE_ASSIGN_OR_RETURN(const planner::Plan plan, planner::MakePlan(question));
  response->set_verdict(ToProto(plan.verdict));
  response->set_device_budget_bytes(plan.device_budget_bytes);
  for (const planner::ContextPlan& context : plan.contexts) ToProto(context, response->add_contexts());
  for (const std::string& text : plan.assumptions) response->add_assumptions(text);
  for (const std::string& text : plan.notes) response->add_notes(text);
  if (share > 1) {
    response->add_notes(absl::StrCat("planned for one of ", share,
                                     " devices: ", question.workload.concurrency, " of the sequences and ",
                                     question.device.host_bytes, " bytes of host memory are its part"));
  }
  return absl::OkStatus();
}

}  // namespace kvtide::service
