#include "planner/plan/plan.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status.h"
#include "planner/engines/compressed_latents.h"
#include "planner/engines/llama_cpp.h"
#include "planner/model/weight_size.h"
#include "planner/plan/hardware.h"
#include "planner/plan/overheads.h"
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
    const double above = static_cast<double>(free_low), below = static_cast<double>(free_high);
    const double slope = above / (above - below);
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
  std::unique_ptr<KvSizer> whole;  // of all layers, when the GPUs hold a part of them each
  int64_t max_context = 0;
};

// Data-parallel attention copies all but the experts.
int64_t WeightsPerDevice(const PlanRequest& request) {
  const int64_t bytes = request.weights.bytes, count = request.device.count;
  if (!request.engine.dp_attention) return CeilDiv(bytes, count);
  const int64_t experts = ExpertBytes(request.model, bytes);
  return bytes - experts + CeilDiv(experts, count);
}

class Planner {
 public:
  explicit Planner(const PlanRequest& request)
      : request_(request),
        rank_(PerDeviceGeometry(request)),
        groups_(GroupLayers(rank_)),
        budget_(request.device.UsableBytes()),
        margin_(MarginBytes(request)),
        weights_(WeightsPerDevice(request)),
        harms_(request.quality, request.model, WindowPolicy(request.engine), request.accept_proxy_quality,
               request.engine.calibrated_keys.has_value() ? &*request.engine.calibrated_keys : nullptr) {}

  absl::StatusOr<Plan> Run() {
    KVTIDE_RETURN_IF_ERROR(PreparePairs());
    KVTIDE_RETURN_IF_ERROR(PrepareDraft());
    Plan plan;
    plan.model_name = request_.model.name;
    plan.engine_name = EngineName(request_.engine.engine);
    plan.device_budget_bytes = budget_;
    plan.weights_bytes = weights_;
    plan.verdict = Verdict::kFits;
    for (int64_t context : request_.workload.contexts) {
      plan.contexts.push_back(PlanContext(context));
      if (IsCancelled(request_.cancellation)) return absl::CancelledError("the plan was cancelled");
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
    if (pairs.empty()) pairs = DefaultPairs(request_.engine, latent);
    only_format_ = HasCompressedLatents(groups_) && QueuesSequences(request_.engine.engine);
    if (only_format_ && request_.pairs.empty()) pairs = {CompressedLatentPair()};
    if (latent) {
      for (TypePair& pair : pairs) pair.v = "none";
    }
    absl::StatusOr<std::unique_ptr<KvSizer>> half =
        MakeKvSizer(request_.engine, rank_, groups_, {"f16", latent ? "none" : "f16"});
    if (only_format_) half = MakeKvSizer(request_.engine, rank_, groups_, CompressedLatentPair());
    if (half.ok()) half_ = *std::move(half);
    bool any = false;
    absl::Status first_error;
    for (const TypePair& pair : pairs) {
      if (IsCancelled(request_.cancellation)) return absl::CancelledError("the plan was cancelled");
      PreparedPair prepared;
      prepared.asked = pair;
      absl::StatusOr<std::unique_ptr<KvSizer>> sizer = MakeKvSizer(request_.engine, rank_, groups_, pair);
      if (sizer.ok()) {
        prepared.sizer = *std::move(sizer);
        if (SplitsLayers(request_) && request_.device.count > 1) {
          KVTIDE_ASSIGN_OR_RETURN(prepared.whole, MakeKvSizer(request_.engine, request_.model,
                                                              GroupLayers(request_.model), pair));
        }
        prepared.support = FindSupport(request_.engine, prepared.sizer->effective(), groups_);
        // Without a GPU nothing falls back to the CPU and nothing is expanded for it.
        const bool gpu_question = prepared.support.level == SupportLevel::kDequantise ||
                                  prepared.support.level == SupportLevel::kCpuFallback;
        if (request_.device.memory == DeviceMemory::kHost && gpu_question)
          prepared.support = {SupportLevel::kNative, prepared.support.build, ""};
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

  // A draft model or next-token prediction layers: a second cache and a second context.
  absl::Status PrepareDraft() {
    const Workload& work = request_.workload;
    if (work.draft.has_value()) drafts_.push_back(*work.draft);
    if (work.mtp_layers > 0) {
      drafts_.push_back({MtpGeometry(request_.model, work.mtp_layers), {}, {"f16", "f16"}});
    }
    for (DraftModel& draft : drafts_) {
      const std::vector<LayerGroup> groups = GroupLayers(draft.model);
      if (std::all_of(groups.begin(), groups.end(),
                      [](const LayerGroup& group) { return group.kind == LayerKind::kMla; })) {
        draft.pair.v = "none";
      }
      auto sizer = MakeKvSizer(request_.engine, draft.model, groups, draft.pair);
      if (!sizer.ok()) return Annotate(sizer.status(), "draft");
      draft_sizers_.push_back(*std::move(sizer));
    }
    return absl::OkStatus();
  }

  // Tokens of one sequence, where a context is those of all slots.
  int64_t PerSequence(int64_t context) const {
    if (!request_.engine.total_context) return context;
    return std::max<int64_t>(1, context / request_.workload.concurrency);
  }

  std::string plan_engine() const { return EngineName(request_.engine.engine); }

  // Sequences that one device holds.
  int64_t Share(int64_t sequences) const {
    return request_.engine.dp_attention ? CeilDiv(sequences, request_.device.count) : sequences;
  }

  // What one device holds of so many sequences.
  KvLoad Load(int64_t context, int64_t sequences) const {
    return {context, Share(sequences), std::min(request_.workload.shared_prefix_tokens, context - 1)};
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
    // A part of the cache is never called exact.
    const Provenance how =
        !request_.model.uncounted.empty() ? Provenance::kGuess
        : request_.engine.engine == Engine::kLlamaCpp || request_.engine.engine == Engine::kKvtide
            ? Provenance::kExact
            : Provenance::kFormula;
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
      items.push_back({ItemKind::kDraft, Sum(work.draft_bytes, kDraftContextBytes), Provenance::kCalibrated});
    }
    for (size_t i = 0; i < drafts_.size(); ++i) {
      const DraftModel& draft = drafts_[i];
      const KvBytes bytes = draft_sizers_[i]->Bytes(load);
      if (draft.weights.bytes > 0)
        items.push_back({ItemKind::kDraft, draft.weights.bytes, draft.weights.provenance});
      items.push_back({ItemKind::kDraftKv, Sum(bytes.Cache(), bytes.recurrent), Provenance::kFormula});
      const Item compute = DraftComputeItem(request_, draft.model, load);
      if (compute.bytes > 0) items.push_back(compute);
    }
    items.push_back({ItemKind::kMargin, margin_, Provenance::kGuess});
    return items;
  }

  int64_t FreeBytes(const KvSizer& sizer, int64_t context, int64_t sequences) const {
    const KvLoad load = Load(context, sequences);
    return budget_ - TotalBytes(Items(sizer, load, sizer.Bytes(load)));
  }

  // Sequences that --max-total-tokens of SGLang lets run on all devices together; without it any number.
  int64_t PoolLimit(int64_t context) const {
    const EngineOptions& engine = request_.engine;
    if (engine.engine != Engine::kSglang || engine.max_total_tokens == 0) return kMaxPlannedConcurrency;
    const int64_t page = std::max(1, engine.page_tokens);
    const int64_t pools = engine.dp_attention ? request_.device.count : 1;
    return pools * (engine.max_total_tokens / page * page / RoundUp(context, page));
  }

  int64_t MaxContext(const KvSizer& sizer) const {
    int64_t limit = request_.model.max_context > 0 ? request_.model.max_context : kUnknownMaxContext;
    if (request_.engine.engine == Engine::kSglang && request_.engine.max_total_tokens > 0) {
      limit = std::min(limit, request_.engine.max_total_tokens / Share(request_.workload.concurrency));
      if (limit < 1) return 0;
    }
    if (request_.engine.total_context) limit = Product(limit, request_.workload.concurrency);
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
    const int64_t limit = PoolLimit(context);
    candidate.fits = candidate.free_bytes >= 0 && sequences <= limit;
    const int64_t values = Product(sizer.LiveValues(PerSequence(context)), load.sequences);
    if (values > 0)
      candidate.bits_per_value = 8.0 * static_cast<double>(candidate.kv_bytes) / static_cast<double>(values);
    if (half_ != nullptr && candidate.kv_bytes > 0) {
      candidate.ratio_to_f16 =
          static_cast<double>(half_->Bytes(load).Cache()) / static_cast<double>(candidate.kv_bytes);
    }
    candidate.harm = harms_.Find(candidate.effective, context);
    if (only_format_) {
      candidate.harm = Harm{};
      candidate.harm.measured = candidate.harm.own_format = true;
    }
    candidate.max_context = pair.max_context;
    const int64_t most = request_.engine.engine == Engine::kLlamaCpp ? kLlamaCppMaxSlots : limit;
    candidate.max_concurrency =
        most < 1 ? 0 : LargestFitting(1, most, [&](int64_t n) { return FreeBytes(sizer, context, n); });
    if (QueuesSequences(request_.engine.engine)) {
      const KvBytes one = sizer.Bytes(Load(context, 1));
      const int64_t need = Sum(one.Cache(), one.recurrent);
      const int64_t room = Sum(candidate.free_bytes, Sum(kv.Cache(), kv.recurrent));
      if (need > 0 && room > 0) {
        const int devices = request_.engine.dp_attention ? request_.device.count : 1;
        candidate.pool_bytes = room;
        candidate.pool_concurrency = static_cast<double>(room) / static_cast<double>(need) * devices;
        if (const int64_t cap = request_.engine.max_total_tokens; cap > 0) {
          const double most_at_once = static_cast<double>(cap) / static_cast<double>(context) * devices;
          if (most_at_once < candidate.pool_concurrency) {
            candidate.pool_bytes = static_cast<int64_t>(most_at_once / devices * static_cast<double>(need));
            candidate.pool_concurrency = most_at_once;
          }
        }
        candidate.pool_tokens =
            static_cast<int64_t>(candidate.pool_concurrency * static_cast<double>(context));
      }
    }
    // Where the rest waits in a queue, the speed is that of the sequences that run.
    const int64_t running = QueuesSequences(request_.engine.engine)
                                ? std::clamp<int64_t>(candidate.max_concurrency, 1, sequences)
                                : sequences;
    candidate.speed = PredictSpeed(request_.model, request_.device, request_.engine,
                                   Traffic(pair, context, running), static_cast<int>(running));
    return candidate;
  }

  StepTraffic Traffic(const PreparedPair& pair, int64_t context, int64_t sequences) const {
    StepTraffic traffic;
    const int count = request_.device.count;
    const KvSizer& sizer = pair.whole != nullptr ? *pair.whole : *pair.sizer;
    (SplitsLayers(request_) ? traffic.serial_devices : traffic.tensor_devices) = count;
    const int64_t weights = SplitsLayers(request_) ? request_.weights.bytes : weights_;
    traffic.weight_bytes = ActiveWeightBytes(request_.model, weights, static_cast<int>(sequences));
    traffic.kv_bytes = Product(sizer.ReadBytes(PerSequence(context)), Share(sequences));
    if (request_.engine.dp_attention) {  // what is copied is read by every device, the experts by one each
      const int64_t all = request_.weights.bytes, shared = all - ExpertBytes(request_.model, all);
      const int64_t active = ActiveWeightBytes(request_.model, all, static_cast<int>(sequences));
      traffic.weight_bytes = Sum(shared, std::max<int64_t>(0, active - shared) / count);
    }
    // Of kvtide's pairs those with calibrated keys have a price, kernels of their own or not.
    if (pair.support.level == SupportLevel::kDequantise || request_.engine.engine == Engine::kKvtide) {
      traffic.scratch_bytes = Product(sizer.StepScratchBytes(PerSequence(context)), sequences);
    }
    if (pair.support.level == SupportLevel::kCpuFallback) {
      traffic.host_attend_bytes = traffic.pcie_bytes = traffic.kv_bytes;
      traffic.kv_bytes = 0;
    }
    return traffic;
  }

  bool WithinBudget(const Harm& harm) const {
    return !request_.max_ppl_increase_percent.has_value() ||
           harm.compared_percent() <= *request_.max_ppl_increase_percent;
  }

  // Whether size aside nothing speaks against the pair.
  Rejection Eligibility(const Candidate& candidate) const {
    if (candidate.support.level == SupportLevel::kRefused) return Rejection::kRefused;
    if (candidate.support.level == SupportLevel::kCpuFallback) return Rejection::kCpuFallback;
    if (!candidate.harm.measured) {
      return request_.allow_unmeasured ? Rejection::kNone : Rejection::kUnmeasured;
    }
    if (!WithinBudget(candidate.harm)) return Rejection::kOverBudget;
    return Rejection::kNone;
  }

  // Of the yardstick itself: no measurement of a coded pair is as good, however small the change it found.
  static bool IsExact(const Candidate& candidate) {
    return candidate.harm.measured && candidate.harm.model.empty() && !candidate.harm.own_format;
  }

  static bool SameHarm(const Candidate& a, const Candidate& b) {
    return a.harm.compared_percent() == b.harm.compared_percent() && IsExact(a) == IsExact(b);
  }

  static bool Better(const Candidate& a, const Candidate& b) {
    if (a.harm.measured != b.harm.measured) return a.harm.measured;
    if (!a.harm.measured) return a.total_bytes > b.total_bytes;  // more bits are the safer guess
    const double harm = a.harm.compared_percent(), other = b.harm.compared_percent();
    if (harm != other) return harm < other;
    if (IsExact(a) != IsExact(b)) return IsExact(a);
    return a.total_bytes < b.total_bytes;
  }

  ContextPlan PlanContext(int64_t context) const {
    ContextPlan result;
    result.context = context;
    for (const PreparedPair& pair : pairs_) {
      if (IsCancelled(request_.cancellation)) return result;  // Run says so
      result.candidates.push_back(Judge(pair, context));
    }
    for (Candidate& candidate : result.candidates) candidate.rejection = Eligibility(candidate);
    result.chosen = Best(result, Rejection::kNone, [](const Candidate& candidate) { return candidate.fits; });
    // An engine that queues starts as soon as one sequence fits.
    if (result.chosen < 0 && QueuesSequences(request_.engine.engine)) {
      result.chosen = Best(result, Rejection::kNone,
                           [](const Candidate& candidate) { return candidate.max_concurrency >= 1; });
    }
    result.split = ExactWithExpertsOnHost(result);
    if (result.split.has_value()) result.chosen = -1;
    for (int i = 0; i < static_cast<int>(result.candidates.size()); ++i) {
      Candidate& candidate = result.candidates[i];
      if (candidate.rejection != Rejection::kNone || i == result.chosen) continue;
      if (!candidate.fits) {
        candidate.rejection = Rejection::kTooLarge;
        continue;
      }
      const bool equal = result.chosen >= 0 && SameHarm(candidate, result.candidates[result.chosen]);
      candidate.rejection = equal ? Rejection::kMoreBytes : Rejection::kMoreHarm;
    }
    if (result.chosen >= 0) {
      const Candidate& chosen = result.candidates[result.chosen];
      result.verdict = Verdict::kFits;
      result.running =
          std::min<int64_t>(request_.workload.concurrency, std::max<int64_t>(1, chosen.max_concurrency));
    } else if (result.split.has_value()) {
      result.verdict = Verdict::kFitsWithTiers;
    } else {
      FindSplit(&result);
    }
    result.reason = Reason(result);
    return result;
  }

  // The least harmful candidate of those with this rejection and `room`; -1 = none.
  template <class Room>
  static int Best(const ContextPlan& context, Rejection rejection, const Room& room) {
    int best = -1;
    for (int i = 0; i < static_cast<int>(context.candidates.size()); ++i) {
      const Candidate& candidate = context.candidates[i];
      if (candidate.rejection != rejection || !room(candidate)) continue;
      if (best < 0 || Better(candidate, context.candidates[best])) best = i;
    }
    return best;
  }

  std::optional<Split> SplitOf(const ContextPlan& result, size_t i) const {
    return BestSplit(request_, result.candidates[i],
                     Traffic(pairs_[i], result.context, request_.workload.concurrency));
  }

  // Experts of a mixture on the CPU cost time alone, a coded cache costs quality: where they make room for
  // the exact cache, no coded pair is taken, also if one would fit.
  std::optional<Split> ExactWithExpertsOnHost(const ContextPlan& result) const {
    if (request_.engine.engine != Engine::kLlamaCpp) return std::nullopt;
    if (result.chosen >= 0 && IsExact(result.candidates[result.chosen])) return std::nullopt;
    for (size_t i = 0; i < pairs_.size(); ++i) {
      const Candidate& candidate = result.candidates[i];
      if (candidate.rejection != Rejection::kNone || candidate.fits || !IsExact(candidate)) continue;
      std::optional<Split> split = SplitOf(result, i);
      if (split.has_value() && split->cpu_expert_layers > 0) return split;
    }
    return std::nullopt;
  }

  // Experts on the CPU before whole layers; then the split of the least harmful pair, unless another is a
  // good deal faster: a coded cache makes room, but weights on the CPU cost the time, and harm is forever.
  void FindSplit(ContextPlan* result) const {
    constexpr double kGoodDeal = 2;
    struct Option {
      Split split;
      double harm;
      bool experts() const { return split.cpu_expert_layers > 0; }
    };
    std::vector<Option> options;
    double fastest = 0;
    for (size_t i = 0; i < pairs_.size() && !IsCancelled(request_.cancellation); ++i) {
      const Candidate& candidate = result->candidates[i];
      if (candidate.rejection != Rejection::kTooLarge) continue;
      std::optional<Split> split = SplitOf(*result, i);
      if (!split.has_value()) continue;
      fastest = std::max(fastest, split->speed.tokens_per_s);
      options.push_back({*std::move(split), candidate.harm.compared_percent()});
    }
    const Option* best = nullptr;
    for (const Option& option : options) {
      const bool slow = option.split.speed.known && option.split.speed.tokens_per_s * kGoodDeal < fastest;
      if (slow && !option.experts()) continue;
      const auto better = [&] {
        if (option.experts() != best->experts()) return option.experts();
        if (option.harm != best->harm) return option.harm < best->harm;
        return option.split.host_kv_bytes < best->split.host_kv_bytes;
      };
      if (best == nullptr || better()) best = &option;
    }
    if (best != nullptr) result->split = best->split;
    result->verdict = best != nullptr ? Verdict::kFitsWithTiers : Verdict::kDoesNotFit;
  }

  static std::string HowKnown(const Harm& harm) {
    std::string how;
    if (harm.proxy) how = harm.resembles ? ", another model with such keys" : ", a model with other keys";
    if (harm.expected_percent > harm.ppl_change_percent)
      absl::StrAppendFormat(&how, "; %+.2f %% expected, as %s takes other pairs", harm.expected_percent,
                            harm.expected_of);
    return how;
  }

  std::string Reason(const ContextPlan& result) const {
    if (result.chosen >= 0) {
      const Candidate& chosen = result.candidates[result.chosen];
      std::string why;
      if (!chosen.harm.measured) {
        why = absl::StrCat(chosen.asked.Name(), " fits, but its harm is not measured (--allow-unmeasured)");
      } else if (chosen.harm.own_format) {
        why = absl::StrCat(chosen.asked.Name(), " fits, the only format that ", plan_engine(),
                           " has for these latents");
      } else if (chosen.harm.ppl_change_percent == 0 && chosen.harm.model.empty()) {
        why = absl::StrCat(chosen.asked.Name(), " fits");
      } else {
        why = absl::StrCat(
            chosen.asked.Name(), " is the least harmful measured pair that fits (",
            absl::StrFormat("%+.2f %% perplexity on %s", chosen.harm.ppl_change_percent, chosen.harm.model),
            HowKnown(chosen.harm), ")");
      }
      if (!chosen.fits) {
        return absl::StrCat(why, ": ", result.running, " of ", request_.workload.concurrency,
                            " sequences run at once, the other ",
                            request_.workload.concurrency - result.running, " wait in the queue");
      }
      absl::StrAppend(&why, ", ", FormatBytes(chosen.free_bytes), " to spare",
                      chosen.harm.measured && chosen.harm.model.empty() && !chosen.harm.own_format
                          ? "; nothing needs to be compressed"
                          : "");
      if (chosen.support.NeedsFork()) {
        absl::StrAppend(&why, "; no upstream build has it, it needs the ", chosen.support.build,
                        " fork of llama.cpp");
      }
      return why;
    }
    if (result.split.has_value()) return WhySplit(result);
    return WhyNothingFits(result);
  }

  // Whether host memory was given that layers could move to.
  bool QuestionOfHost() const {
    return request_.device.host_bytes > 0 && !QueuesSequences(request_.engine.engine);
  }

  std::string MoreRoom() const {
    if (request_.device.arch == "apple")
      return "smaller weights or a larger share for the GPU (iogpu.wired_limit_mb; --device "
             "...,memory=448GiB) "
             "would";
    return request_.engine.engine == Engine::kLlamaCpp && request_.device.memory == DeviceMemory::kOwn
               ? "smaller weights, more or larger devices, or host memory (--device ...,host=64GiB) would"
               : "smaller weights, or more or larger devices would";
  }

  std::string WhySplit(const ContextPlan& result) const {
    const Split& split = *result.split;
    std::vector<std::string> on_host;
    if (split.host_weight_bytes > 0) on_host.push_back(FormatBytes(split.host_weight_bytes) + " of weights");
    if (split.host_kv_bytes > 0) on_host.push_back(FormatBytes(split.host_kv_bytes) + " of cache");
    const std::string how = absl::StrCat(split.pair.Name(), " fits with ", absl::StrJoin(on_host, " and "),
                                         " on the host: ", split.how);
    const int coded =
        Best(result, Rejection::kMoreHarm, [](const Candidate& candidate) { return candidate.fits; });
    if (coded < 0) return absl::StrCat("no allowed pair fits the device; ", how);
    const Candidate& other = result.candidates[coded];
    return absl::StrCat(
        how, "; ", other.asked.Name(), " would fit without (",
        absl::StrFormat("%+.2f %% perplexity on %s", other.harm.ppl_change_percent, other.harm.model),
        "): --pairs ", other.asked.Name());
  }

  std::string WhyNothingFits(const ContextPlan& result) const {
    if (PoolLimit(result.context) < 1) {
      return absl::StrCat("a pool of --max-total-tokens ", request_.engine.max_total_tokens,
                          " is smaller than one sequence of ", result.context, " tokens");
    }
    if (weights_ + margin_ > budget_ && !QuestionOfHost()) {
      return absl::StrCat("the weights alone, ", FormatBytes(weights_),
                          " on each device, pass its budget of ", FormatBytes(budget_ - margin_), " (",
                          FormatBytes(budget_), " less ", FormatBytes(margin_),
                          " kept free): no cache type helps, ", MoreRoom());
    }
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
    const bool refused = std::all_of(pairs_.begin(), pairs_.end(),
                                     [](const PreparedPair& pair) { return pair.sizer == nullptr; });
    const bool no_kernel =
        std::all_of(result.candidates.begin(), result.candidates.end(),
                    [](const Candidate& candidate) { return candidate.rejection == Rejection::kRefused; });
    if ((refused || no_kernel) && !pairs_.empty()) return pairs_.front().support.reason;
    std::string why = nearest == nullptr
                          ? "no pair is both measured and supported"
                          : absl::StrCat("the smallest allowed pair, ", nearest->asked.Name(), ", misses ",
                                         FormatBytes(-nearest->free_bytes), "; its largest context is ",
                                         std::max<int64_t>(0, nearest->max_context), " tokens");
    if (unmeasured != nullptr) {
      absl::StrAppend(&why, "; ", unmeasured->asked.Name(),
                      " would fit, but its harm is not measured (--allow-unmeasured)");
    }
    if (request_.engine.engine == Engine::kSglang && request_.engine.mem_fraction_static == 0) {
      absl::StrAppend(&why, "; SGLang keeps ", FormatBytes(margin_),
                      " for activations and graphs, less with a higher --mem-fraction-static or a smaller "
                      "--chunked-prefill-size");
    }
    if (request_.device.host_bytes == 0 && !QueuesSequences(request_.engine.engine)) {
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
      plan->assumptions.push_back(
          "speed is that of a server such as vLLM; it counts no coupling between engine and daemon");
    }
    KeyAssumptions(plan);
    if (!harms_.differences().empty()) {
      plan->assumptions.push_back(
          absl::StrCat("harm: no measured model resembles this one (", harms_.differences(),
                       "): the worst of all is shown; measure yours with `kvtide eval`"));
    }
    SpeedAssumptions(plan);
    plan->assumptions.push_back("prefill is not predicted");
  }

  // Which keys a profile calibrates, and what the harm of the chosen pairs rests on.
  void KeyAssumptions(Plan* plan) const {
    if (!request_.engine.calibrated_keys.has_value()) return;
    const CalibratedKeys& keys = *request_.engine.calibrated_keys;
    plan->assumptions.push_back(
        absl::StrCat("keys: of pairs marked calibrated, coded by ", keys.name,
                     keys.text.empty() ? "" : absl::StrCat(" (", keys.tokens, " tokens of ", keys.text, ")"),
                     !keys.transforms   ? "; it has no transforms, which tide types need"
                     : !keys.after_rope ? "; tide types code them before RoPE"
                                        : "; tide types code them after RoPE",
                     keys.means ? "" : "; it serves them alone"));
    for (const ContextPlan& context : plan->contexts)
      if (keys.after_rope && keys.context > 0 && context.context > keys.context) {
        plan->assumptions.push_back(absl::StrCat(
            "keys: the profile has seen positions up to ", keys.context,
            "; keys after RoPE spread otherwise at later ones, and what that costs was not measured"));
        break;
      }
    std::set<std::string> rows;
    for (const ContextPlan& context : plan->contexts) {
      if (context.chosen < 0) continue;
      const Candidate& chosen = context.candidates[static_cast<size_t>(context.chosen)];
      if (chosen.harm.model.empty()) continue;
      rows.insert(absl::StrCat("harm: ", chosen.asked.Name(), " on ", chosen.harm.model, ", ",
                               chosen.harm.tokens, " tokens of ", chosen.harm.text, ", ",
                               chosen.harm.key_profile.empty()
                                   ? "without a profile"
                                   : absl::StrCat("with a profile of ", chosen.harm.key_profile,
                                                  chosen.harm.after_rope ? ", keys after RoPE" : "")));
    }
    plan->assumptions.insert(plan->assumptions.end(), rows.begin(), rows.end());
  }

  void SpeedAssumptions(Plan* plan) const {
    const Candidate& first = plan->contexts.front().candidates.front();
    if (!first.speed.known) return;
    const std::string card = CardClassName(ClassOfCard(request_.device));
    plan->assumptions.push_back(
        first.speed.points > 0
            ? absl::StrCat("speed: error bars hold the ", first.speed.points, " published measurements on ",
                           card)
            : absl::StrCat("speed: nothing published about this engine on ", card, "; the bars are wide"));
    if (request_.device.count > 1 && SplitsLayers(request_)) {
      plan->assumptions.push_back(
          "the GPUs hold layers one after another and so work one after another: memory adds up, speed does "
          "not "
          "(--split-mode tensor shares every layer)");
    }
    if (!drafts_.empty() || request_.workload.draft_bytes > 0) {
      plan->assumptions.push_back(
          "speed counts no speculation: what a draft gains depends on how much is accepted");
    }
  }

  // What servers do with layers that are not plain.
  void ServerNotes(Plan* plan) const {
    if (!QueuesSequences(request_.engine.engine)) return;
    const auto any = [&](auto property) {
      return std::any_of(request_.model.layers.begin(), request_.model.layers.end(), property);
    };
    if (request_.engine.engine == Engine::kSglang && !request_.engine.swa_full && !only_format_ &&
        any([](const LayerGeometry& layer) { return layer.window > 0; })) {
      plan->notes.push_back(absl::StrFormat(
          "sliding layers get slots for %g of the tokens (--swa-full-tokens-ratio) where SGLang knows the "
          "architecture as hybrid; in others they keep every token: plan with --swa-full",
          request_.engine.swa_full_tokens_ratio));
    }
    for (const ContextPlan& context : plan->contexts) {
      const int64_t limit = PoolLimit(context.context);
      if (limit < request_.workload.concurrency)
        plan->notes.push_back(absl::StrCat("--max-total-tokens ", request_.engine.max_total_tokens, " lets ",
                                           limit, " of ", request_.workload.concurrency, " sequences of ",
                                           context.context, " tokens run at once"));
    }
  }

  void Notes(Plan* plan) const {
    if (!request_.model.uncounted.empty()) {
      plan->notes.push_back(absl::StrCat("the cache is larger than these numbers, which do not count ",
                                         absl::StrJoin(request_.model.uncounted, "; ")));
    }
    for (std::string& note : HardwareNotes(request_)) plan->notes.push_back(std::move(note));
    ServerNotes(plan);
    for (const PreparedPair& pair : pairs_) {
      if (pair.sizer == nullptr) continue;
      for (const std::string& rewrite : pair.sizer->rewrites()) {
        plan->notes.push_back(absl::StrCat(pair.asked.Name(), ": ", rewrite));
      }
    }
    if (request_.engine.engine == Engine::kLlamaCpp && request_.workload.concurrency > kLlamaCppMaxSlots) {
      plan->notes.push_back(absl::StrCat("llama.cpp has at most ", kLlamaCppMaxSlots, " slots, asked were ",
                                         request_.workload.concurrency));
    }
    for (int64_t context : request_.workload.contexts) {
      const int64_t limit = request_.engine.total_context && !request_.engine.unified
                                ? Product(request_.model.max_context, request_.workload.concurrency)
                                : request_.model.max_context;
      if (request_.model.max_context > 0 && context > limit) {
        plan->notes.push_back(absl::StrCat("context ", context, " is beyond the ", request_.model.max_context,
                                           " that the model was made for"));
      }
    }
    SupportNotes(plan);
    DataParallelNote(plan);
  }

  // A latent cache is not divided by tensor parallelism: every GPU keeps all of it, unless each attends for
  // sequences of its own.
  void DataParallelNote(Plan* plan) const {
    const bool latent = std::any_of(groups_.begin(), groups_.end(),
                                    [](const LayerGroup& group) { return group.kind == LayerKind::kMla; });
    if (!latent || request_.device.count == 1 || request_.engine.dp_attention ||
        !QueuesSequences(request_.engine.engine) || plan->contexts.empty() || pairs_.empty())
      return;
    const ContextPlan& last = plan->contexts.back();
    PlanRequest parallel = request_;
    parallel.engine.dp_attention = true;
    parallel.workload.contexts = {last.context};
    parallel.pairs = {pairs_[static_cast<size_t>(std::max(0, last.chosen))].asked};
    const absl::StatusOr<Plan> other = Planner(parallel).Run();
    if (!other.ok()) return;
    const int64_t whole =
        std::max<int64_t>(0, last.candidates[static_cast<size_t>(std::max(0, last.chosen))].max_concurrency);
    const int64_t divided = std::max<int64_t>(0, other->contexts[0].candidates[0].max_concurrency);
    if (whole == 0 && divided == 0) return;  // weights alone are too large
    plan->notes.push_back(absl::StrCat(
        "each of the ", request_.device.count, " GPUs keeps the whole latent cache: ", whole,
        " sequences of ", last.context, " tokens; with data-parallel attention (--dp-attention; ",
        request_.engine.engine == Engine::kVllm ? "--enable-expert-parallel --data-parallel-size "
                                                : "--enable-dp-attention --dp-size ",
        request_.device.count, ") ", divided));
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
  const HarmTable harms_;
  std::unique_ptr<KvSizer> half_;
  std::vector<DraftModel> drafts_;
  std::vector<std::unique_ptr<KvSizer>> draft_sizers_;  // of drafts_
  std::vector<PreparedPair> pairs_;
  bool only_format_ = false;  // the engine has one format for the model's cache
};

}  // namespace

EngineOptions EngineOnDevice(const PlanRequest& request) {
  EngineOptions engine = request.engine;
  const CardClass card = ClassOfCard(request.device);
  if (card == CardClass::kCpu) engine.backend = LlamaBackend::kCpu;
  if (card == CardClass::kApple) engine.backend = LlamaBackend::kMetal;
  engine.compute_capability = request.device.ComputeCapability();
  if (engine.engine == Engine::kSglang)  // windows of some models are sized by it
    engine.chunked_prefill = SglangDefaultsOf(request).chunked_prefill;
  return engine;
}

absl::StatusOr<Plan> MakePlan(const PlanRequest& request) {
  KVTIDE_RETURN_IF_ERROR(CheckPlanRequest(request));
  PlanRequest known = request;
  known.engine = EngineOnDevice(request);
  return Planner(known).Run();
}

}  // namespace kvtide::planner
