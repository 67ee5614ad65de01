#include "planner/render/render.h"

#include <algorithm>
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

std::string HarmText(const Harm& harm) {
  if (!harm.measured) return "?";
  return absl::StrFormat("%+.2f%%%s", harm.ppl_change_percent, harm.proxy ? "*" : "");
}

std::string SpeedText(const Speed& speed) {
  if (!speed.known) return "?";
  return absl::StrFormat("%.0f (%.0f-%.0f)", speed.tokens_per_s, speed.tokens_per_s_low,
                         speed.tokens_per_s_high);
}

std::string WhyNot(const Candidate& candidate, bool chosen) {
  if (chosen) return "chosen";
  std::string why = RejectionText(candidate.rejection);
  if (candidate.rejection == Rejection::kTooLarge)
    absl::StrAppend(&why, " by ", FormatMiB(-candidate.free_bytes), " MiB");
  if (candidate.total_bytes == 0) absl::StrAppend(&why, ": ", candidate.support.reason);
  if (!candidate.fits && candidate.total_bytes > 0 && candidate.rejection == Rejection::kUnmeasured) {
    absl::StrAppend(&why, ", too large by ", FormatMiB(-candidate.free_bytes), " MiB");
  }
  return why;
}

std::string CandidateLine(const Candidate& candidate, bool chosen) {
  std::string name = candidate.asked.Name();
  if (!(candidate.asked == candidate.effective)) absl::StrAppend(&name, " > ", candidate.effective.Name());
  if (candidate.total_bytes == 0) {
    return absl::StrFormat("%s %-18s %s", chosen ? ">" : " ", name, WhyNot(candidate, chosen));
  }
  return absl::StrFormat(
      "%s %-18s %10s %6.2f %6.2fx %10s %9s %-10s %9d %6d  %-16s %s", chosen ? ">" : " ", name,
      FormatMiB(candidate.kv_bytes), candidate.bits_per_value, candidate.ratio_to_f16,
      FormatMiB(candidate.free_bytes), HarmText(candidate.harm), SupportLevelName(candidate.support.level),
      std::max<int64_t>(0, candidate.max_context), std::max<int64_t>(0, candidate.max_concurrency),
      SpeedText(candidate.speed), WhyNot(candidate, chosen));
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
  std::vector<int> shown;
  for (int i = 0; i < static_cast<int>(context.candidates.size()); ++i) {
    const Candidate& candidate = context.candidates[static_cast<size_t>(i)];
    const auto beats = [&](const Candidate& other) {
      return other.harm.measured && other.total_bytes > 0 &&
             other.harm.ppl_change_percent <= candidate.harm.ppl_change_percent &&
             other.kv_bytes <= candidate.kv_bytes &&
             (other.harm.ppl_change_percent < candidate.harm.ppl_change_percent ||
              other.kv_bytes < candidate.kv_bytes);
    };
    const bool frontier = candidate.harm.measured && candidate.total_bytes > 0 &&
                          std::none_of(context.candidates.begin(), context.candidates.end(), beats);
    if (all || i == context.chosen || frontier) shown.push_back(i);
  }
  return shown;
}

std::string ContextTable(const ContextPlan& context, const TableStyle& style, bool items) {
  const Painter paint(style.color);
  std::string text = absl::StrCat(paint(kBold, absl::StrCat("context ", context.context)), ": ",
                                  paint(VerdictColor(context.verdict), VerdictText(context.verdict)), " - ",
                                  context.reason, "\n");
  absl::StrAppend(&text,
                  paint(kDim, absl::StrFormat("  %-18s %10s %6s %7s %10s %9s %-10s %9s %6s  %-16s %s", "pair",
                                              "KV MiB", "bits", "ratio", "left MiB", "harm", "kernel",
                                              "max ctx", "seqs", "tok/s", "")),
                  "\n");
  const std::vector<int> shown = PairsToShow(context, style.all_pairs);
  for (int i : shown) {
    const Candidate& candidate = context.candidates[static_cast<size_t>(i)];
    const bool chosen = i == context.chosen;
    const std::string line = CandidateLine(candidate, chosen);
    absl::StrAppend(&text, chosen ? paint(kGreen, line) : candidate.fits ? line : paint(kDim, line), "\n");
  }
  if (const size_t hidden = context.candidates.size() - shown.size(); hidden > 0) {
    absl::StrAppend(&text,
                    paint(kDim, absl::StrCat("  ", hidden,
                                             " more pairs, not measured or beaten by one "
                                             "above on both harm and bytes: --all shows them")),
                    "\n");
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
std::string Summary(const Plan& plan, const Painter& paint) {
  std::string text = paint(kDim, absl::StrFormat("%10s  %-22s %-18s %10s %10s %9s  %-16s", "context",
                                                 "verdict", "pair", "KV MiB", "left MiB", "harm", "tok/s")) +
                     "\n";
  for (const ContextPlan& context : plan.contexts) {
    std::string line = absl::StrFormat("%10d  %-22s", context.context, VerdictText(context.verdict));
    if (context.chosen >= 0) {
      const Candidate& chosen = context.candidates[static_cast<size_t>(context.chosen)];
      absl::StrAppendFormat(&line, " %-18s %10s %10s %9s  %s", chosen.asked.Name(),
                            FormatMiB(chosen.kv_bytes), FormatMiB(chosen.free_bytes), HarmText(chosen.harm),
                            SpeedText(chosen.speed));
    } else if (context.split.has_value()) {
      absl::StrAppendFormat(&line, " %-18s %10s %10s %9s  %s", context.split->pair.Name(),
                            FormatMiB(context.split->device_kv_bytes + context.split->host_kv_bytes), "split",
                            "", SpeedText(context.split->speed));
    }
    absl::StrAppend(&text, paint(VerdictColor(context.verdict), line), "\n");
  }
  return text;
}

Json JsonOf(const Speed& speed) {
  if (!speed.known) return nullptr;
  return Json{{"tokens_per_s", speed.tokens_per_s},
              {"low", speed.tokens_per_s_low},
              {"high", speed.tokens_per_s_high},
              {"step_ms", speed.step_ms}};
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
  if (candidate.harm.measured) {
    json["harm"] = {{"ppl_change_percent", candidate.harm.ppl_change_percent},
                    {"proxy", candidate.harm.proxy},
                    {"model", candidate.harm.model},
                    {"context", candidate.harm.context}};
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
  json["split"] = nullptr;
  if (context.split.has_value()) {
    json["split"] = {{"pair", context.split->pair.Name()},
                     {"device_kv_bytes", context.split->device_kv_bytes},
                     {"host_kv_bytes", context.split->host_kv_bytes},
                     {"device_layers", context.split->device_layers},
                     {"how", context.split->how},
                     {"speed", JsonOf(context.split->speed)}};
  }
  json["pairs"] = Json::array();
  for (const Candidate& candidate : context.candidates) json["pairs"].push_back(JsonOf(candidate));
  return json;
}

// What is behind every kernel level of the plan that is not plain "native", each reason once.
std::string KernelLines(const Plan& plan) {
  std::vector<std::string> reasons;
  for (const Candidate& candidate : plan.contexts.front().candidates) {
    if (candidate.support.reason.empty() || candidate.total_bytes == 0) continue;
    const std::string reason = absl::StrCat(SupportLevelName(candidate.support.level), " (",
                                            candidate.support.build, "): ", candidate.support.reason);
    if (std::find(reasons.begin(), reasons.end(), reason) == reasons.end()) reasons.push_back(reason);
  }
  std::string text;
  for (const std::string& reason : reasons) absl::StrAppend(&text, "kernel: ", reason, "\n");
  return text;
}

bool UsesProxy(const Plan& plan) {
  for (const ContextPlan& context : plan.contexts) {
    for (const Candidate& candidate : context.candidates) {
      if (candidate.harm.proxy) return true;
    }
  }
  return false;
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
  std::string text =
      absl::StrCat(paint(kBold, plan.model_name), " in ", plan.engine_name, " on ",
                   device.count > 1 ? absl::StrCat(device.count, " x ") : "", device.name, ": ",
                   FormatBytes(plan.device_budget_bytes), " usable", device.count > 1 ? " each" : "",
                   ", weights ", FormatBytes(plan.weights_bytes), ", ", request.workload.concurrency,
                   request.workload.concurrency == 1 ? " sequence" : " sequences", "\n\n");
  const bool one_context = plan.contexts.size() == 1;
  if (!one_context) absl::StrAppend(&text, Summary(plan, paint), "\n");
  for (const ContextPlan& context : plan.contexts)
    absl::StrAppend(&text, ContextTable(context, style, one_context || style.all_pairs), "\n");
  absl::StrAppend(&text,
                  "harm: change of perplexity as measured by `kvtide eval`; ? = not measured, never chosen",
                  UsesProxy(plan) ? "; * = measured on another model" : "", "\n");
  if (!plan.contexts.empty()) absl::StrAppend(&text, KernelLines(plan));
  for (const std::string& note : plan.notes) absl::StrAppend(&text, "note: ", note, "\n");
  for (const std::string& assumption : plan.assumptions)
    absl::StrAppend(&text, "assumed: ", assumption, "\n");
  for (const Claim& claim : style.all_pairs ? ClaimsAbout(plan) : std::vector<Claim>()) {
    absl::StrAppend(
        &text,
        paint(kDim, absl::StrCat("claim (", claim.source, "): ", claim.claim, ". Checked: ", claim.verdict)),
        "\n");
  }
  return text;
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
      "tokens_per_s_high\n";
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
        absl::StrAppendFormat(&text, ",%.2f,%.2f,%.2f\n", c.speed.tokens_per_s, c.speed.tokens_per_s_low,
                              c.speed.tokens_per_s_high);
      } else {
        absl::StrAppend(&text, ",,,\n");
      }
    }
  }
  return text;
}

}  // namespace kvtide::planner
