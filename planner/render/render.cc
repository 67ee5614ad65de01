#include "planner/render/render.h"

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "planner/csv.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using Json = nlohmann::ordered_json;

const char* const kReset = "\x1b[0m";
const char* const kBold = "\x1b[1m";
const char* const kGreen = "\x1b[32m";
const char* const kYellow = "\x1b[33m";
const char* const kRed = "\x1b[31m";
const char* const kDim = "\x1b[2m";

class Painter {
 public:
  explicit Painter(bool color) : color_(color) {}
  std::string operator()(const char* code, const std::string& text) const {
    return color_ ? absl::StrCat(code, text, kReset) : text;
  }

 private:
  const bool color_;
};

const char* VerdictText(Verdict verdict) {
  switch (verdict) {
    case Verdict::kFits:
      return "fits";
    case Verdict::kFitsWithTiers:
      return "fits only with tiers";
    case Verdict::kDoesNotFit:
      return "does not fit";
  }
  return "";
}

const char* VerdictColor(Verdict verdict) {
  return verdict == Verdict::kFits ? kGreen : verdict == Verdict::kFitsWithTiers ? kYellow : kRed;
}

// With the model it was measured on: "+0.17% tidelm-7m"; "~+0.90% SmolLM2-135M" is what that model is
// expected to take of a pair that was measured on another one.
std::string HarmText(const Harm& harm) {
  if (!harm.measured) return "not measured";
  if (harm.own_format) return "own format";
  if (harm.model.empty()) return "none";
  const char* how = harm.calibrated ? ", calibrated" : "";
  if (harm.expected_percent > harm.ppl_change_percent)
    return absl::StrFormat("~%+.2f%% %s%s", harm.expected_percent, harm.expected_of, how);
  return absl::StrFormat("%+.2f%% %s%s", harm.ppl_change_percent, harm.model, how);
}

// Small speeds with a digit behind the point.
std::string Rate(double tokens_per_s) {
  return tokens_per_s < 20 ? absl::StrFormat("%.1f", tokens_per_s) : absl::StrFormat("%.0f", tokens_per_s);
}

std::string SpeedText(const Speed& speed) {
  if (!speed.known) return "?";
  return absl::StrCat(Rate(speed.tokens_per_s), " (", Rate(speed.tokens_per_s_low), "-",
                      Rate(speed.tokens_per_s_high), ")");
}

// "kernel" column: what the attention does, and the fork that one has to build first.
std::string KernelText(const Support& support) {
  return absl::StrCat(SupportLevelName(support.level),
                      support.NeedsFork() ? absl::StrCat(", ", support.build) : "");
}

// The question in the words of the engine: "4 sequences of 8192 tokens (llama-server -c 32768 -np 4 -kvu)".
std::string LoadText(const PlanRequest& request, int64_t context) {
  const EngineOptions& engine = request.engine;
  const int64_t n = request.workload.concurrency;
  const std::string sequences = absl::StrCat(n, n == 1 ? " sequence" : " sequences");
  if (engine.engine != Engine::kLlamaCpp) return absl::StrCat(sequences, " of ", context, " tokens");
  if (engine.total_context) {
    return absl::StrCat("-c ", context, engine.unified ? " shared by " : " divided among ", n,
                        n == 1 ? " slot" : " slots", " (llama-server -np ", n,
                        engine.unified && n > 1 ? " -kvu" : "", ")");
  }
  const int64_t prefix = request.workload.shared_prefix_tokens;
  const int64_t cells = engine.unified ? Sum(prefix, Product(n, context - prefix)) : Product(n, context);
  return absl::StrCat(sequences, " of ", context, " tokens (llama-server -c ", cells, " -np ", n,
                      engine.unified && n > 1 ? " -kvu" : "", ")");
}

std::string WhyNot(const Candidate& candidate, bool chosen) {
  if (chosen) return "chosen";
  std::string why = RejectionText(candidate.rejection);
  if (candidate.rejection == Rejection::kTooLarge) {
    why = candidate.free_bytes < 0 ? absl::StrCat(why, " by ", FormatMiB(-candidate.free_bytes), " MiB")
                                   : "more than --max-total-tokens";
  }
  if (candidate.total_bytes == 0) absl::StrAppend(&why, ": ", candidate.support.reason);
  if (candidate.free_bytes < 0 && candidate.total_bytes > 0 &&
      candidate.rejection == Rejection::kUnmeasured) {
    absl::StrAppend(&why, ", too large by ", FormatMiB(-candidate.free_bytes), " MiB");
  }
  return why;
}

// Columns that grow with what stands in them.
struct Widths {
  int harm = 20;
  int kernel = 10;

  void Hold(const Candidate& candidate) {
    harm = std::max(harm, static_cast<int>(HarmText(candidate.harm).size()));
    kernel = std::max(kernel, static_cast<int>(KernelText(candidate.support).size()));
  }
};

std::string CandidateLine(const Candidate& candidate, bool chosen, const Widths& widths) {
  std::string name = candidate.asked.Name();
  if (!(candidate.asked == candidate.effective)) absl::StrAppend(&name, " > ", candidate.effective.Name());
  if (candidate.total_bytes == 0) {
    return absl::StrFormat("%s %-15s %s", chosen ? ">" : " ", name, WhyNot(candidate, chosen));
  }
  return absl::StrFormat(
      "%s %-15s %9s %5.2f %5.2fx %9s %-*s %-*s %9d %5d  %-15s %s", chosen ? ">" : " ", name,
      FormatMiB(candidate.kv_bytes), candidate.bits_per_value, candidate.ratio_to_f16,
      FormatMiB(candidate.free_bytes), widths.harm, HarmText(candidate.harm), widths.kernel,
      KernelText(candidate.support), std::max<int64_t>(0, candidate.max_context),
      std::max<int64_t>(0, candidate.max_concurrency),
      candidate.fits || chosen ? SpeedText(candidate.speed) : "-", WhyNot(candidate, chosen));
}

// Sizes are those of one GPU, and say so where there are several.
const char* CacheHead(int devices) { return devices > 1 ? "MiB/GPU" : "KV MiB"; }
const char* RestHead(int devices) { return devices > 1 ? "left/GPU" : "left MiB"; }

std::string TableHead(int devices, const Widths& widths) {
  return absl::StrFormat("  %-15s %9s %5s %6s %9s %-*s %-*s %9s %5s  %-15s", "pair", CacheHead(devices),
                         "bits", "ratio", RestHead(devices), widths.harm, "harm, measured on", widths.kernel,
                         "kernel", "max ctx", "seqs", "tok/s");
}

// The bill in one line.
std::string BillLine(const Plan& plan, int devices, const Candidate& candidate, bool queue) {
  const char* const memory = devices > 1 ? "memory per GPU: " : "memory: ";
  int64_t weights = 0, cache = 0, margin = 0, other = 0;
  for (const Item& item : candidate.items) {
    switch (item.kind) {
      case ItemKind::kWeights:
        weights = Sum(weights, item.bytes);
        break;
      case ItemKind::kMargin:
        margin = Sum(margin, item.bytes);
        break;
      case ItemKind::kKvFull:
      case ItemKind::kKvSliding:
      case ItemKind::kKvChunked:
      case ItemKind::kKvLatent:
      case ItemKind::kKvWindowTail:
      case ItemKind::kKvRounding:
      case ItemKind::kRecurrent:
        cache = Sum(cache, item.bytes);
        break;
      default:
        other = Sum(other, item.bytes);
    }
  }
  if (queue) {  // what is left is the pool of those that run
    const int64_t all = plan.device_budget_bytes - Sum(weights, other, margin);
    const int64_t pool = candidate.pool_bytes > 0 ? std::min(candidate.pool_bytes, all) : all;
    return absl::StrCat(memory, FormatBytes(plan.device_budget_bytes), " = weights ", FormatBytes(weights),
                        " + cache ", FormatBytes(pool), " + buffers ", FormatBytes(other), " + margin ",
                        FormatBytes(margin), pool < all ? " + free " + FormatBytes(all - pool) : "");
  }
  return absl::StrCat(memory, FormatBytes(plan.device_budget_bytes), " = weights ", FormatBytes(weights),
                      " + cache ", FormatBytes(cache), " + buffers ", FormatBytes(other), " + margin ",
                      FormatBytes(margin), candidate.free_bytes >= 0 ? " + free " : "; missing ",
                      FormatBytes(std::abs(candidate.free_bytes)));
}

// "speed: 4 x 35 = 140 tokens/s (110 to 170)".
std::string SpeedLine(const Candidate& candidate, int64_t sequences) {
  const Speed& speed = candidate.speed;
  if (!speed.known) return "speed: not predicted (bandwidth or weights unknown)";
  const std::string bars =
      absl::StrCat(" (", Rate(speed.tokens_per_s_low), " to ", Rate(speed.tokens_per_s_high), ")");
  if (sequences <= 1) return absl::StrCat("speed: ", Rate(speed.tokens_per_s), " tokens/s", bars);
  return absl::StrCat("speed: ", Rate(speed.per_sequence), " tokens/s per sequence, ",
                      Rate(speed.tokens_per_s), " in total", bars);
}

std::string ItemLines(const Candidate& candidate) {
  std::string text;
  for (const Item& item : candidate.items) {
    absl::StrAppendFormat(&text, "    %-28s %12s MiB  %s\n", ItemKindLabel(item.kind), FormatMiB(item.bytes),
                          ProvenanceName(item.provenance));
  }
  absl::StrAppendFormat(&text, "    %-28s %12s MiB\n", "sum", FormatMiB(candidate.total_bytes));
  return text;
}

// Pairs that a reader has to see: the choice, the exact pair, and those that nothing measured beats on harm
// and bytes.
std::vector<int> PairsToShow(const ContextPlan& context, bool all) {
  constexpr size_t kMostRows = 6;
  std::vector<int> shown;
  const auto at = [&](int i) -> const Candidate& { return context.candidates[static_cast<size_t>(i)]; };
  for (int i = 0; i < static_cast<int>(context.candidates.size()); ++i) {
    const Candidate& candidate = at(i);
    const auto beats = [&](const Candidate& other) {
      return other.harm.measured && other.total_bytes > 0 &&
             other.harm.compared_percent() <= candidate.harm.compared_percent() &&
             other.kv_bytes <= candidate.kv_bytes &&
             (other.harm.compared_percent() < candidate.harm.compared_percent() ||
              other.kv_bytes < candidate.kv_bytes);
    };
    // bf16 is f16 as far as bytes and harm go.
    const bool repeated = std::any_of(shown.begin(), shown.end(), [&](int other) {
      return at(other).harm.measured && at(other).kv_bytes == candidate.kv_bytes &&
             at(other).harm.compared_percent() == candidate.harm.compared_percent();
    });
    // The 8-bit types of servers have no measurement and are asked for all the same.
    const bool usual = candidate.asked.k == "fp8" && candidate.asked.v != "tq4" && candidate.total_bytes > 0;
    const bool frontier = candidate.harm.measured && candidate.total_bytes > 0 && !repeated &&
                          std::none_of(context.candidates.begin(), context.candidates.end(), beats);
    if (all || i == context.chosen || frontier || usual) shown.push_back(i);
  }
  if (all || shown.size() <= kMostRows) return shown;
  // The exact pair, the choice, and what lies nearest to it.
  const int64_t near = context.chosen >= 0 ? at(context.chosen).kv_bytes : at(shown.back()).kv_bytes;
  std::stable_sort(shown.begin() + 1, shown.end(), [&](int a, int b) {
    const auto rank = [&](int i) { return i == context.chosen ? -1 : std::abs(at(i).kv_bytes - near); };
    return rank(a) < rank(b);
  });
  shown.resize(kMostRows);
  std::sort(shown.begin(), shown.end());
  return shown;
}

std::string Heading(const ContextPlan& context, const Painter& paint) {
  const bool queue = context.chosen >= 0 && !context.candidates[static_cast<size_t>(context.chosen)].fits;
  return absl::StrCat(
      paint(kBold, absl::StrCat("context ", context.context)), ": ",
      paint(queue ? kYellow : VerdictColor(context.verdict),
            queue ? absl::StrCat("fits, ", context.running, " at once") : VerdictText(context.verdict)),
      " - ", context.reason, "\n");
}

std::string ContextTable(const ContextPlan& context, const TableStyle& style, bool items) {
  const Painter paint(style.color);
  const std::vector<int> shown = PairsToShow(context, style.full || style.every_pair);
  Widths widths;
  for (int i : shown) widths.Hold(context.candidates[static_cast<size_t>(i)]);
  std::string text = paint(kDim, TableHead(style.devices, widths)) + "\n";
  for (int i : shown) {
    const Candidate& candidate = context.candidates[static_cast<size_t>(i)];
    const bool chosen = i == context.chosen;
    const std::string line = CandidateLine(candidate, chosen, widths);
    absl::StrAppend(&text, chosen ? paint(kGreen, line) : candidate.fits ? line : paint(kDim, line), "\n");
  }
  if (const size_t hidden = context.candidates.size() - shown.size(); hidden > 0) {
    absl::StrAppend(&text, paint(kDim, absl::StrCat("  ", hidden, " more pairs: --all shows them")), "\n");
  }
  if (items && context.chosen >= 0)
    absl::StrAppend(&text, ItemLines(context.candidates[static_cast<size_t>(context.chosen)]));
  if (context.split.has_value()) {
    const Split& split = *context.split;
    absl::StrAppend(&text, "    ", split.pair.Name(), " split: ", FormatMiB(split.device_kv_bytes),
                    " MiB on the device, ", FormatMiB(split.host_kv_bytes), " MiB on the host; ", split.how,
                    "; tok/s ", SpeedText(split.speed), "\n");
  }
  return text;
}

// One line per context: what to run.
std::string Summary(const Plan& plan, int devices, const Painter& paint) {
  Widths widths;
  for (const ContextPlan& context : plan.contexts)
    if (context.chosen >= 0) widths.Hold(context.candidates[static_cast<size_t>(context.chosen)]);
  std::string text = paint(kDim, absl::StrFormat("%10s  %-22s %-18s %10s %10s  %-*s %-16s", "context",
                                                 "verdict", "pair", CacheHead(devices), RestHead(devices),
                                                 widths.harm, "harm, measured on", "tok/s")) +
                     "\n";
  for (const ContextPlan& context : plan.contexts) {
    const bool queue = context.chosen >= 0 && !context.candidates[static_cast<size_t>(context.chosen)].fits;
    std::string line = absl::StrFormat("%10d  %-22s", context.context,
                                       queue ? absl::StrCat("fits, ", context.running, " at once")
                                             : std::string(VerdictText(context.verdict)));
    if (context.chosen >= 0) {
      const Candidate& chosen = context.candidates[static_cast<size_t>(context.chosen)];
      absl::StrAppendFormat(&line, " %-18s %10s %10s  %-*s %s", chosen.asked.Name(),
                            FormatMiB(chosen.kv_bytes), FormatMiB(chosen.free_bytes), widths.harm,
                            HarmText(chosen.harm), SpeedText(chosen.speed));
    } else if (context.split.has_value()) {
      absl::StrAppendFormat(&line, " %-18s %10s %10s  %-*s %s", context.split->pair.Name(),
                            FormatMiB(context.split->device_kv_bytes + context.split->host_kv_bytes), "split",
                            widths.harm, "", SpeedText(context.split->speed));
    }
    absl::StrAppend(&text, paint(VerdictColor(context.verdict), line), "\n");
  }
  return text;
}

Json JsonOf(const Speed& speed) {
  if (!speed.known) return nullptr;
  return Json{{"tokens_per_s", speed.tokens_per_s}, {"low", speed.tokens_per_s_low},
              {"high", speed.tokens_per_s_high},    {"per_sequence", speed.per_sequence},
              {"published_points", speed.points},   {"step_ms", speed.step_ms}};
}

Json JsonOf(const Candidate& candidate) {
  Json json;
  json["pair"] = candidate.asked.Name();
  json["effective_pair"] = candidate.effective.Name();
  json["fits"] = candidate.fits;
  json["rejection"] = RejectionName(candidate.rejection);
  json["kernel"] = {{"level", SupportLevelName(candidate.support.level)},
                    {"build", candidate.support.build},
                    {"reason", candidate.support.reason}};
  json["kv_bytes"] = candidate.kv_bytes;
  json["total_bytes"] = candidate.total_bytes;
  json["free_bytes"] = candidate.free_bytes;
  json["bits_per_value"] = candidate.bits_per_value;
  json["ratio_to_f16"] = candidate.ratio_to_f16;
  json["max_context"] = std::max<int64_t>(0, candidate.max_context);
  json["max_concurrency"] = std::max<int64_t>(0, candidate.max_concurrency);
  if (candidate.pool_concurrency > 0) {
    json["pool_tokens"] = candidate.pool_tokens;
    json["pool_concurrency"] = candidate.pool_concurrency;
  }
  if (candidate.harm.measured) {
    json["harm"] = {{"ppl_change_percent", candidate.harm.ppl_change_percent},
                    {"proxy", candidate.harm.proxy},
                    {"model", candidate.harm.model},
                    {"context", candidate.harm.context},
                    {"text", candidate.harm.text},
                    {"tokens", candidate.harm.tokens},
                    {"calibrated", candidate.harm.calibrated},
                    {"key_profile", candidate.harm.key_profile},
                    {"expected_percent", candidate.harm.compared_percent()},
                    {"resembles", candidate.harm.resembles}};
  } else {
    json["harm"] = nullptr;
  }
  json["speed"] = JsonOf(candidate.speed);
  json["items"] = Json::array();
  for (const Item& item : candidate.items) {
    json["items"].push_back({{"item", ItemKindName(item.kind)},
                             {"bytes", item.bytes},
                             {"provenance", ProvenanceName(item.provenance)}});
  }
  return json;
}

Json JsonOf(const ContextPlan& context) {
  Json json;
  json["context"] = context.context;
  json["verdict"] = VerdictName(context.verdict);
  json["chosen"] =
      context.chosen >= 0 ? Json(context.candidates[context.chosen].asked.Name()) : Json(nullptr);
  json["reason"] = context.reason;
  json["running"] = context.running;
  json["split"] = nullptr;
  if (context.split.has_value()) {
    json["split"] = {{"pair", context.split->pair.Name()},
                     {"device_kv_bytes", context.split->device_kv_bytes},
                     {"host_kv_bytes", context.split->host_kv_bytes},
                     {"host_weight_bytes", context.split->host_weight_bytes},
                     {"device_layers", context.split->device_layers},
                     {"cpu_expert_layers", context.split->cpu_expert_layers},
                     {"how", context.split->how},
                     {"speed", JsonOf(context.split->speed)}};
  }
  json["pairs"] = Json::array();
  for (const Candidate& candidate : context.candidates) json["pairs"].push_back(JsonOf(candidate));
  return json;
}

// What is behind every kernel level of the pairs shown that is not plain "native", each reason once with its
// pairs.
std::vector<std::string> KernelLines(const ContextPlan& context, bool all) {
  constexpr size_t kMostNames = 3;
  std::vector<std::pair<std::string, std::vector<std::string>>> reasons;  // and the pairs that it is of
  for (int i : PairsToShow(context, all)) {
    const Candidate& candidate = context.candidates[static_cast<size_t>(i)];
    if (candidate.support.reason.empty() || candidate.total_bytes == 0) continue;
    const std::string reason = absl::StrCat(SupportLevelName(candidate.support.level), " (",
                                            candidate.support.build, "): ", candidate.support.reason);
    auto known = std::find_if(reasons.begin(), reasons.end(),
                              [&](const auto& entry) { return entry.first == reason; });
    if (known == reasons.end()) known = reasons.insert(reasons.end(), {reason, {}});
    known->second.push_back(candidate.asked.Name());
  }
  std::vector<std::string> lines;
  for (auto& [reason, pairs] : reasons) {
    const size_t more = pairs.size() > kMostNames + 1 ? pairs.size() - kMostNames : 0;
    if (more > 0) pairs.resize(kMostNames);
    lines.push_back(absl::StrCat("kernel: ", absl::StrJoin(pairs, ", "),
                                 more > 0 ? absl::StrCat(" and ", more, " more") : "", ": ", reason));
  }
  return lines;
}

// What vLLM and SGLang print at their start.
std::string PoolLine(const ContextPlan& context) {
  const Candidate& chosen = context.candidates[static_cast<size_t>(std::max(0, context.chosen))];
  if (context.chosen < 0 || chosen.pool_concurrency <= 0) return "";
  return absl::StrFormat(
      "pool: KV cache of %d tokens, maximum concurrency for %d tokens per request: %.2fx\n",
      chosen.pool_tokens, context.context, chosen.pool_concurrency);
}

// The short answer: one context in some lines, several as a summary and the pairs of the longest.
std::string ShortAnswer(const Plan& plan, const TableStyle& style) {
  const Painter paint(style.color);
  std::string text;
  if (plan.contexts.size() > 1) absl::StrAppend(&text, Summary(plan, style.devices, paint), "\n");
  const ContextPlan& last =
      *std::max_element(plan.contexts.begin(), plan.contexts.end(),
                        [](const ContextPlan& a, const ContextPlan& b) { return a.context < b.context; });
  absl::StrAppend(&text, Heading(last, paint));
  if (last.chosen >= 0) {
    const Candidate& chosen = last.candidates[static_cast<size_t>(last.chosen)];
    absl::StrAppend(&text, BillLine(plan, style.devices, chosen, !chosen.fits), "\n");
    absl::StrAppend(&text, SpeedLine(chosen, last.running), "\n");
  }
  absl::StrAppend(&text, PoolLine(last), "\n", ContextTable(last, style, false), "\n");
  constexpr size_t kMostLines = 5;
  std::vector<std::string> lines;
  for (const std::string& note : plan.notes) lines.push_back("note: " + note);
  for (const std::string& line : KernelLines(last, false)) lines.push_back(line);
  for (const std::string& assumption : plan.assumptions) {
    if (absl::StartsWith(assumption, "weights") || absl::StartsWith(assumption, "speed:") ||
        absl::StartsWith(assumption, "harm:") || absl::StartsWith(assumption, "keys:") ||
        absl::StartsWith(assumption, "catalogue geometry") || absl::StrContains(assumption, "is taken as"))
      lines.push_back("assumed: " + assumption);
  }
  for (size_t i = 0; i < lines.size() && i < kMostLines; ++i) absl::StrAppend(&text, lines[i], "\n");
  absl::StrAppend(&text, paint(kDim, "every pair, assumption and byte: --all; the arithmetic: --explain"),
                  "\n");
  return text;
}

std::string FullAnswer(const Plan& plan, const TableStyle& style) {
  const Painter paint(style.color);
  std::string text;
  if (plan.contexts.size() > 1) absl::StrAppend(&text, Summary(plan, style.devices, paint), "\n");
  for (const ContextPlan& context : plan.contexts) {
    absl::StrAppend(&text, Heading(context, paint));
    if (context.chosen >= 0) {
      const Candidate& chosen = context.candidates[static_cast<size_t>(context.chosen)];
      absl::StrAppend(&text, SpeedLine(chosen, context.running), "\n", PoolLine(context));
    }
    absl::StrAppend(&text, ContextTable(context, style, true), "\n");
  }
  absl::StrAppend(
      &text,
      "harm: change of perplexity by `kvtide eval` on the model named; a pair that is not measured "
      "is never chosen without --allow-unmeasured\n");
  for (const std::string& line : KernelLines(plan.contexts.front(), true)) absl::StrAppend(&text, line, "\n");
  for (const std::string& note : plan.notes) absl::StrAppend(&text, "note: ", note, "\n");
  for (const std::string& assumption : plan.assumptions)
    absl::StrAppend(&text, "assumed: ", assumption, "\n");
  for (const Claim& claim : ClaimsAbout(plan)) {
    absl::StrAppend(
        &text,
        paint(kDim, absl::StrCat("claim (", claim.source, "): ", claim.claim, ". Checked: ", claim.verdict)),
        "\n");
  }
  return text;
}

}  // namespace

std::vector<Claim> ClaimsAbout(const Plan& plan) {
  std::vector<Claim> about;
  if (plan.contexts.empty()) return about;
  for (const Claim& claim : PublishedClaims()) {
    if (!claim.models.empty() && !absl::StrContains(";" + claim.models + ";", ";" + plan.model_name + ";"))
      continue;
    for (const Candidate& candidate : plan.contexts.front().candidates) {
      if (candidate.asked.Name() != claim.pair) continue;
      about.push_back(claim);
      break;
    }
  }
  return about;
}

std::string RenderTable(const PlanRequest& request, const Plan& plan, const TableStyle& style) {
  const Painter paint(style.color);
  const DeviceBudget& device = request.device;
  const std::string what = plan.contexts.size() == 1
                               ? LoadText(request, plan.contexts.front().context)
                               : absl::StrCat(request.workload.concurrency,
                                              request.workload.concurrency == 1 ? " sequence" : " sequences");
  const std::string text =
      absl::StrCat(paint(kBold, plan.model_name), " in ", plan.engine_name, " on ",
                   device.count > 1 ? absl::StrCat(device.count, " x ") : "", device.name, ", ", what, "\n");
  TableStyle sized = style;
  sized.devices = device.count;
  return absl::StrCat(text, style.full ? FullAnswer(plan, sized) : ShortAnswer(plan, sized));
}

std::string RenderJson(const PlanRequest& request, const Plan& plan) {
  Json json;
  json["schema"] = "kvtide.plan/1";
  json["model"] = plan.model_name;
  json["geometry_source"] = request.model.source;
  json["engine"] = plan.engine_name;
  json["verdict"] = VerdictName(plan.verdict);
  json["concurrency"] = request.workload.concurrency;
  json["shared_prefix_tokens"] = request.workload.shared_prefix_tokens;
  json["exact_window"] = {{"first_blocks", request.engine.exact_window.first_blocks},
                          {"last_blocks", request.engine.exact_window.last_blocks}};
  json["key_profile"] = nullptr;
  if (const auto& keys = request.engine.calibrated_keys; keys.has_value()) {
    json["key_profile"] = {{"name", keys->name},
                           {"text", keys->text},
                           {"tokens", keys->tokens},
                           {"means", keys->means},
                           {"transforms", keys->transforms},
                           {"after_rope", keys->after_rope},
                           {"context", keys->context}};
  }
  json["device"] = {{"name", request.device.name},
                    {"count", request.device.count},
                    {"vram_bytes", request.device.vram_bytes},
                    {"driver_reserve_bytes", request.device.driver_reserve_bytes},
                    {"in_use_bytes", request.device.in_use_bytes},
                    {"usable_bytes", plan.device_budget_bytes},
                    {"bandwidth_gb_s", request.device.bandwidth_gb_s},
                    {"pcie_gb_s", request.device.pcie_gb_s},
                    {"host_bytes", request.device.host_bytes}};
  json["weights"] = {{"bytes_per_device", plan.weights_bytes},
                     {"source", request.weights.source},
                     {"provenance", ProvenanceName(request.weights.provenance)}};
  json["contexts"] = Json::array();
  for (const ContextPlan& context : plan.contexts) json["contexts"].push_back(JsonOf(context));
  json["notes"] = plan.notes;
  json["assumptions"] = plan.assumptions;
  json["claims"] = Json::array();
  for (const Claim& claim : ClaimsAbout(plan)) {
    json["claims"].push_back(
        {{"pair", claim.pair}, {"claim", claim.claim}, {"checked", claim.verdict}, {"source", claim.source}});
  }
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string RenderCsv(const PlanRequest& request, const Plan& plan) {
  std::string text =
      "model,engine,device,concurrency,context,pair,effective_pair,fits,chosen,rejection,kernel,kv_bytes,"
      "total_bytes,free_bytes,"
      "bits_per_value,ratio_to_f16,ppl_change_percent,harm_proxy,max_context,max_concurrency,tokens_per_s,"
      "tokens_per_s_low,"
      "tokens_per_s_high,device_count\n";
  for (const ContextPlan& context : plan.contexts) {
    for (int i = 0; i < static_cast<int>(context.candidates.size()); ++i) {
      const Candidate& c = context.candidates[i];
      absl::StrAppend(&text, CsvField(plan.model_name), ",", plan.engine_name, ",",
                      CsvField(request.device.name), ",", request.workload.concurrency, ",", context.context,
                      ",", c.asked.Name(), ",", c.effective.Name(), ",", c.fits ? 1 : 0, ",",
                      i == context.chosen ? 1 : 0, ",", CsvField(RejectionName(c.rejection)), ",");
      absl::StrAppend(&text, SupportLevelName(c.support.level), ",", c.kv_bytes, ",", c.total_bytes, ",",
                      c.free_bytes, ",");
      absl::StrAppendFormat(&text, "%.4f,%.4f,%s,%d,%d,%d", c.bits_per_value, c.ratio_to_f16,
                            c.harm.measured ? absl::StrFormat("%.4f", c.harm.ppl_change_percent) : "",
                            c.harm.proxy ? 1 : 0, std::max<int64_t>(0, c.max_context),
                            std::max<int64_t>(0, c.max_concurrency));
      if (c.speed.known) {
        absl::StrAppendFormat(&text, ",%.2f,%.2f,%.2f", c.speed.tokens_per_s, c.speed.tokens_per_s_low,
                              c.speed.tokens_per_s_high);
      } else {
        absl::StrAppend(&text, ",,,");
      }
      absl::StrAppend(&text, ",", request.device.count, "\n");
    }
  }
  return text;
}

}  // namespace kvtide::planner
