#include "planner/plan/plan.h"

#include <algorithm>
#include <functional>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status.h"
#include "planner/engines/overheads.h"
#include "planner/plan/plan_request.h"
#include "planner/plan/split.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kUnknownMaxContext = int64_t{1} << 22;  // searched up to here when the model does not say
constexpr int64_t kDraftContextBytes = 224 * kMiB;        // a second context for a draft model, measured
constexpr double kMmprojFactor = 1.4;                     // file size to device memory, measured

// The largest n in [low, high] with fits(n), low - 1 if none; fits is monotone. Interpolates on missing(n)
// bytes.
int64_t LargestFitting(int64_t low, int64_t high, const std::function<int64_t(int64_t)>& free_bytes) {
  int64_t free_low = free_bytes(low);
  if (free_low < 0) return low - 1;
  int64_t free_high = free_bytes(high);
  if (free_high >= 0) return high;
  bool halve = false;
  while (high - low > 1) {
    const double slope = static_cast<double>(free_low) / static_cast<double>(free_low - free_high);
    int64_t middle =
        halve ? low + (high - low) / 2 : low + static_cast<int64_t>(slope * static_cast<double>(high - low));
    middle = std::clamp(middle, low + 1, high - 1);
    const int64_t free = free_bytes(middle);
    // After a step that cut less than half, the next one bisects.
    const int64_t before = high - low;
    if (free >= 0) {
      low = middle, free_low = free;
    } else {
      high = middle, free_high = free;
    }
    halve = high - low > before / 2;
  }
  return low;
}

const char* SupportText(SupportLevel level) {
  switch (level) {
    case SupportLevel::kNative:
      return "has a native kernel";
    case SupportLevel::kDequantise:
      return "is expanded to f16 in every step";
    case SupportLevel::kCpuFallback:
      return "runs on the CPU";
    case SupportLevel::kRefused:
      return "is refused";
  }
  return "";
}

// Everything about one pair that does not depend on the load.
struct PreparedPair {
  TypePair asked;
  Support support;
  std::unique_ptr<KvSizer> sizer;  // null when the engine cannot store the pair
  int64_t max_context = 0;
};

class Planner {
 public:
  explicit Planner(const PlanRequest& request)
      : request_(request),
        rank_(PerDeviceGeometry(request)),
        groups_(GroupLayers(rank_)),
        budget_(request.device.UsableBytes()),
        margin_(MarginBytes(request)),
        weights_((request.weights.bytes + request.device.count - 1) / request.device.count),
        policy_(WindowPolicy(request.engine)) {}

  absl::StatusOr<Plan> Run() {
    KVTIDE_RETURN_IF_ERROR(PreparePairs());
    Plan plan;
    plan.model_name = request_.model.name;
    plan.engine_name = EngineName(request_.engine.engine);
    plan.device_budget_bytes = budget_;
    plan.weights_bytes = weights_;
    plan.verdict = Verdict::kFits;
    for (int64_t context : request_.workload.contexts) {
      plan.contexts.push_back(PlanContext(context));
      plan.verdict = std::max(plan.verdict, plan.contexts.back().verdict);
    }
    Assumptions(&plan);
    Notes(&plan);
    return plan;
  }

 private:
  absl::Status PreparePairs() {
    const bool latent = std::all_of(groups_.begin(), groups_.end(), [](const LayerGroup& group) {
      return group.kind == LayerKind::kMla || group.kind == LayerKind::kRecurrent;
    });
    std::vector<TypePair> pairs = request_.pairs;
    if (pairs.empty()) pairs = DefaultPairs(request_.engine.engine, latent);
    if (latent) {
      for (TypePair& pair : pairs) pair.v = "none";
    }
    absl::StatusOr<std::unique_ptr<KvSizer>> half =
        MakeKvSizer(request_.engine, rank_, groups_, {"f16", latent ? "none" : "f16"});
    if (half.ok()) half_ = *std::move(half);
    bool any = false;
    absl::Status first_error;
    for (const TypePair& pair : pairs) {
      PreparedPair prepared;
      prepared.asked = pair;
      absl::StatusOr<std::unique_ptr<KvSizer>> sizer = MakeKvSizer(request_.engine, rank_, groups_, pair);
      if (sizer.ok()) {
        prepared.sizer = *std::move(sizer);
        prepared.support = FindSupport(request_.engine, prepared.sizer->effective(), groups_);
        prepared.max_context = MaxContext(*prepared.sizer);
        any = true;
      } else {
        prepared.support = {SupportLevel::kRefused, plan_engine(), std::string(sizer.status().message())};
        if (first_error.ok()) first_error = sizer.status();
      }
      pairs_.push_back(std::move(prepared));
    }
    // Pairs that were asked by name and that the engine does not have are bad input, not a plan.
    if (!any && !request_.pairs.empty()) return Annotate(first_error, "pairs");
    return absl::OkStatus();
  }

  std::string plan_engine() const { return EngineName(request_.engine.engine); }

  KvLoad Load(int64_t context, int64_t sequences) const {
    return {context, sequences, std::min(request_.workload.shared_prefix_tokens, context - 1)};
  }

  ItemList Items(const KvSizer& sizer, const KvLoad& load, const KvBytes& kv) const {
    ItemList items;
    items.push_back({ItemKind::kWeights, weights_, request_.weights.provenance});
    const std::pair<ItemKind, int64_t> parts[] = {{ItemKind::kKvFull, kv.full},
                                                  {ItemKind::kKvSliding, kv.sliding},
                                                  {ItemKind::kKvChunked, kv.chunked},
                                                  {ItemKind::kKvLatent, kv.latent},
                                                  {ItemKind::kKvWindowTail, kv.window_tail},
                                                  {ItemKind::kKvRounding, kv.rounding},
                                                  {ItemKind::kRecurrent, kv.recurrent}};
    const Provenance how =
        request_.engine.engine == Engine::kVllm ? Provenance::kFormula : Provenance::kExact;
    for (const auto& part : parts) {
      if (part.second != 0) items.push_back({part.first, part.second, how});
    }
    for (const Item& item : OverheadItems(request_, load, sizer)) {
      if (item.bytes != 0) items.push_back(item);
    }
    const Workload& work = request_.workload;
    if (work.mmproj_bytes > 0) {
      items.push_back({ItemKind::kMmproj,
                       static_cast<int64_t>(kMmprojFactor * static_cast<double>(work.mmproj_bytes)),
                       Provenance::kCalibrated});
    }
    if (work.draft_bytes > 0) {
      items.push_back({ItemKind::kDraft, work.draft_bytes + kDraftContextBytes, Provenance::kCalibrated});
    }
    items.push_back({ItemKind::kMargin, margin_, Provenance::kGuess});
    return items;
  }

  int64_t FreeBytes(const KvSizer& sizer, int64_t context, int64_t sequences) const {
    const KvLoad load = Load(context, sequences);
    return budget_ - TotalBytes(Items(sizer, load, sizer.Bytes(load)));
  }

  int64_t MaxContext(const KvSizer& sizer) const {
    const int64_t limit = request_.model.max_context > 0 ? request_.model.max_context : kUnknownMaxContext;
    return LargestFitting(
        1, limit, [&](int64_t context) { return FreeBytes(sizer, context, request_.workload.concurrency); });
  }

  Candidate Judge(const PreparedPair& pair, int64_t context) const {
    Candidate candidate;
    candidate.asked = pair.asked;
    candidate.effective = pair.asked;
    candidate.support = pair.support;
    if (pair.sizer == nullptr) return candidate;
    const KvSizer& sizer = *pair.sizer;
    const int64_t sequences = request_.workload.concurrency;
    const KvLoad load = Load(context, sequences);
    const KvBytes kv = sizer.Bytes(load);
    candidate.effective = sizer.effective();
    candidate.items = Items(sizer, load, kv);
    candidate.kv_bytes = kv.Cache();
    candidate.total_bytes = TotalBytes(candidate.items);
    candidate.free_bytes = budget_ - candidate.total_bytes;
    candidate.fits = candidate.free_bytes >= 0;
    const int64_t values = sizer.LiveValues(context) * sequences;
    if (values > 0)
      candidate.bits_per_value = 8.0 * static_cast<double>(candidate.kv_bytes) / static_cast<double>(values);
    if (half_ != nullptr && candidate.kv_bytes > 0) {
      candidate.ratio_to_f16 =
          static_cast<double>(half_->Bytes(load).Cache()) / static_cast<double>(candidate.kv_bytes);
    }
    candidate.harm = FindHarm(request_.quality, candidate.effective, request_.model.name, policy_, context,
                              request_.accept_proxy_quality);
    candidate.max_context = pair.max_context;
    candidate.max_concurrency =
        LargestFitting(1, kMaxPlannedConcurrency, [&](int64_t n) { return FreeBytes(sizer, context, n); });
    candidate.speed =
        PredictSpeed(request_.model, request_.device, Traffic(pair, context), static_cast<int>(sequences));
    return candidate;
  }

  StepTraffic Traffic(const PreparedPair& pair, int64_t context) const {
    StepTraffic traffic;
    const int64_t sequences = request_.workload.concurrency;
    traffic.weight_bytes = ActiveWeightBytes(request_.model, weights_, static_cast<int>(sequences));
    traffic.kv_bytes = pair.sizer->ReadBytes(context) * sequences;
    if (pair.support.level == SupportLevel::kDequantise) {
      traffic.scratch_bytes = pair.sizer->StepScratchBytes(context) * sequences;
    }
    if (pair.support.level == SupportLevel::kCpuFallback) {
      traffic.host_attend_bytes = traffic.pcie_bytes = traffic.kv_bytes;
      traffic.kv_bytes = 0;
    }
    return traffic;
  }

  bool WithinBudget(const Harm& harm) const {
    return !request_.max_ppl_increase_percent.has_value() ||
           harm.ppl_change_percent <= *request_.max_ppl_increase_percent;
  }

  // Whether size aside nothing speaks against the pair.
  Rejection Eligibility(const Candidate& candidate) const {
    if (candidate.support.level == SupportLevel::kRefused) return Rejection::kRefused;
    if (candidate.support.level == SupportLevel::kCpuFallback) return Rejection::kCpuFallback;
    if (!candidate.harm.measured) return Rejection::kUnmeasured;
    if (!WithinBudget(candidate.harm)) return Rejection::kOverBudget;
    return Rejection::kNone;
  }

  static bool Better(const Candidate& a, const Candidate& b) {
    if (a.harm.ppl_change_percent != b.harm.ppl_change_percent) {
      return a.harm.ppl_change_percent < b.harm.ppl_change_percent;
    }
    return a.total_bytes < b.total_bytes;
  }

  ContextPlan PlanContext(int64_t context) const {
    ContextPlan result;
    result.context = context;
    for (const PreparedPair& pair : pairs_) result.candidates.push_back(Judge(pair, context));
    for (int i = 0; i < static_cast<int>(result.candidates.size()); ++i) {
      Candidate& candidate = result.candidates[i];
      candidate.rejection = Eligibility(candidate);
      if (candidate.rejection != Rejection::kNone) continue;
      if (!candidate.fits) {
        candidate.rejection = Rejection::kTooLarge;
      } else if (result.chosen < 0 || Better(candidate, result.candidates[result.chosen])) {
        result.chosen = i;
      }
    }
    for (int i = 0; i < static_cast<int>(result.candidates.size()); ++i) {
      Candidate& candidate = result.candidates[i];
      if (candidate.rejection != Rejection::kNone || i == result.chosen) continue;
      const bool equal =
          candidate.harm.ppl_change_percent == result.candidates[result.chosen].harm.ppl_change_percent;
      candidate.rejection = equal ? Rejection::kMoreBytes : Rejection::kMoreHarm;
    }
    if (result.chosen >= 0) {
      result.verdict = Verdict::kFits;
    } else {
      FindSplit(&result);
    }
    result.reason = Reason(result);
    return result;
  }

  void FindSplit(ContextPlan* result) const {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      const Candidate& candidate = result->candidates[i];
      if (candidate.rejection != Rejection::kTooLarge) continue;
      std::optional<Split> split = BestSplit(request_, candidate, Traffic(pairs_[i], result->context));
      if (!split.has_value()) continue;
      const bool better =
          !result->split.has_value() ||
          (split->speed.known && split->speed.tokens_per_s > result->split->speed.tokens_per_s) ||
          (!split->speed.known && split->host_kv_bytes < result->split->host_kv_bytes);
      if (better) result->split = split;
    }
    result->verdict = result->split.has_value() ? Verdict::kFitsWithTiers : Verdict::kDoesNotFit;
  }

  std::string Reason(const ContextPlan& result) const {
    if (result.chosen >= 0) {
      const Candidate& chosen = result.candidates[result.chosen];
      if (chosen.harm.ppl_change_percent == 0 && chosen.harm.model.empty()) {
        return absl::StrCat(chosen.asked.Name(), " fits with ", FormatBytes(chosen.free_bytes),
                            " to spare; nothing needs to be compressed");
      }
      return absl::StrCat(
          chosen.asked.Name(), " is the least harmful measured pair that fits (",
          absl::StrFormat("%+.2f %% perplexity on %s", chosen.harm.ppl_change_percent, chosen.harm.model),
          chosen.harm.proxy ? ", another model" : "", "), ", FormatBytes(chosen.free_bytes), " to spare");
    }
    if (result.split.has_value()) {
      return absl::StrCat("no allowed pair fits the device; ", result.split->pair.Name(), " fits with ",
                          FormatBytes(result.split->host_kv_bytes), " on the host: ", result.split->how);
    }
    return WhyNothingFits(result);
  }

  std::string WhyNothingFits(const ContextPlan& result) const {
    const Candidate* nearest = nullptr;
    const Candidate* unmeasured = nullptr;
    for (const Candidate& candidate : result.candidates) {
      if (candidate.rejection == Rejection::kTooLarge &&
          (nearest == nullptr || candidate.free_bytes > nearest->free_bytes)) {
        nearest = &candidate;
      }
      if (candidate.rejection == Rejection::kUnmeasured && candidate.fits &&
          (unmeasured == nullptr || candidate.total_bytes > unmeasured->total_bytes)) {
        unmeasured = &candidate;
      }
    }
    std::string why = nearest == nullptr
                          ? "no pair is both measured and supported"
                          : absl::StrCat("the smallest allowed pair, ", nearest->asked.Name(), ", misses ",
                                         FormatBytes(-nearest->free_bytes), "; its largest context is ",
                                         std::max<int64_t>(0, nearest->max_context), " tokens");
    if (unmeasured != nullptr) {
      absl::StrAppend(&why, "; ", unmeasured->asked.Name(), " would fit, but its harm is not measured");
    }
    if (request_.device.host_bytes == 0 && request_.engine.engine != Engine::kVllm) {
      absl::StrAppend(&why, "; no host memory was given (--device ...,host=64GiB)");
    }
    return why;
  }

  void Assumptions(Plan* plan) const {
    plan->assumptions = request_.model.assumptions;
    const DeviceBudget& device = request_.device;
    if (!device.assumption.empty()) plan->assumptions.push_back(device.assumption);
    if (request_.weights.bytes == 0) {
      plan->assumptions.push_back("no weights were given: the plan counts none");
    } else {
      plan->assumptions.push_back(absl::StrCat("weights: ", request_.weights.source, " (",
                                               ProvenanceName(request_.weights.provenance), ")"));
    }
    if (request_.model.n_embd == 0 || request_.model.n_vocab == 0) {
      plan->assumptions.push_back(
          "width or vocabulary of the model is unknown: compute buffers assume 4096 and 131072");
    }
    if (device.driver_reserve_bytes > 0) {
      plan->assumptions.push_back(
          absl::StrCat("the driver keeps ", FormatBytes(device.driver_reserve_bytes),
                       device.driver_reserve_is_guess ? " (guess: 0.5 %)" : " (published)"));
    }
    if (device.host_bytes > 0 && device.host_bandwidth_gb_s == 0) {
      plan->assumptions.push_back("host memory bandwidth is taken as 80 GB/s");
    }
    if (device.bandwidth_gb_s == 0)
      plan->assumptions.push_back("memory bandwidth is unknown: no speed is predicted");
    if (request_.model.max_context == 0)
      plan->assumptions.push_back("the model's largest context is unknown");
    if (request_.engine.engine == Engine::kKvtide) {
      plan->assumptions.push_back("speed counts no coupling between engine and daemon");
    }
    plan->assumptions.push_back("prefill is not predicted");
  }

  void Notes(Plan* plan) const {
    for (const PreparedPair& pair : pairs_) {
      if (pair.sizer == nullptr) continue;
      for (const std::string& rewrite : pair.sizer->rewrites()) {
        plan->notes.push_back(absl::StrCat(pair.asked.Name(), ": ", rewrite));
      }
    }
    for (int64_t context : request_.workload.contexts) {
      if (request_.model.max_context > 0 && context > request_.model.max_context) {
        plan->notes.push_back(absl::StrCat("context ", context, " is beyond the ", request_.model.max_context,
                                           " that the model was made for"));
      }
    }
    SupportNotes(plan);
  }

  // Pairs of nearly equal size that only kernel support tells apart.
  void SupportNotes(Plan* plan) const {
    if (plan->contexts.empty()) return;
    const ContextPlan& last = plan->contexts.back();
    for (const Candidate& a : last.candidates) {
      for (const Candidate& b : last.candidates) {
        const bool comparable = a.asked.k == b.asked.k && a.kv_bytes > 0 && a.kv_bytes <= b.kv_bytes &&
                                b.kv_bytes - a.kv_bytes < b.kv_bytes / 50 && a.asked.v != b.asked.v;
        if (!comparable || a.support.level == b.support.level || a.support.level == SupportLevel::kRefused ||
            b.support.level == SupportLevel::kRefused) {
          continue;
        }
        plan->notes.push_back(absl::StrFormat(
            "%s and %s differ by %.2f MiB at %d tokens; kernel support tells them apart, not size: %s %s in "
            "the %s tree, %s %s "
            "in the %s tree",
            a.asked.Name(), b.asked.Name(), static_cast<double>(b.kv_bytes - a.kv_bytes) / kMiB, last.context,
            a.asked.Name(), SupportText(a.support.level), a.support.build, b.asked.Name(),
            SupportText(b.support.level), b.support.build));
      }
    }
  }

  const PlanRequest& request_;
  const ModelGeometry rank_;
  const std::vector<LayerGroup> groups_;
  const int64_t budget_;
  const int64_t margin_;
  const int64_t weights_;
  const std::string policy_;
  std::unique_ptr<KvSizer> half_;
  std::vector<PreparedPair> pairs_;
};

}  // namespace

absl::StatusOr<Plan> MakePlan(const PlanRequest& request) {
  KVTIDE_RETURN_IF_ERROR(CheckPlanRequest(request));
  return Planner(request).Run();
}

}  // namespace kvtide::planner
