#include "clients/cli/demo/demo_report.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cli/terminal/json_text.h"
#include "clients/cli/terminal/table.h"
#include "nlohmann/json.hpp"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using nlohmann::ordered_json;
using planner::FormatBytes;

double BytesPerToken(const DemoReport& r) {
  return r.stored_tokens > 0 ? static_cast<double>(r.stored_bytes) / static_cast<double>(r.stored_tokens) : 0;
}

ordered_json ReuseJson(const DemoReuse& reuse) {
  if (reuse.ways.empty()) return nullptr;
  ordered_json json = {{"prompt_tokens", reuse.prompt_tokens},
                       {"shared_tokens", reuse.shared_tokens},
                       {"computed_seconds", reuse.computed_seconds},
                       {"computed_perplexity", reuse.computed_perplexity},
                       {"ways", ordered_json::array()}};
  for (const DemoReuse::Way& way : reuse.ways)
    json["ways"].push_back({{"what", way.what},
                            {"tier", way.tier},
                            {"reused_tokens", way.reused_tokens},
                            {"seconds", way.seconds},
                            {"perplexity", way.perplexity}});
  return json;
}

}  // namespace

bool DemoReport::AllSame() const {
  return std::all_of(steps.begin(), steps.end(),
                     [](const DemoStep& s) { return !s.checked || s.same_tokens; });
}

std::string RenderDemoTable(const DemoReport& r, const Terminal& terminal) {
  Table table({{"", Align::kLeft}, {"", Align::kLeft}});
  const auto row = [&](const std::string& name, const std::string& value) { table.AddRow({name, value}); };
  row("pair", absl::StrCat(r.pair, "  (", r.pair_reason, ")"));
  row("bytes per token",
      absl::StrFormat("%.0f of %d in f16: %.2fx smaller", BytesPerToken(r), r.f16_bytes_per_token,
                      static_cast<double>(r.f16_bytes_per_token) / std::max(1.0, BytesPerToken(r))));
  row("sequence",
      absl::StrCat(r.stored_tokens, " tokens in ", FormatBytes(r.stored_bytes),
                   r.stored_bytes == r.predicted_bytes
                       ? ", exactly as planned"
                       : absl::StrCat(", planned ", r.predicted_bytes - r.stored_bytes, " bytes more")));
  for (const DemoTier& tier : r.tiers) {
    row(tier.name + " tier", absl::StrCat(tier.blocks, " blocks, ", FormatBytes(tier.used_bytes), " of ",
                                          FormatBytes(tier.capacity_bytes)));
  }
  row("moves", absl::StrCat(r.moves, " blocks, ", FormatBytes(r.moved_bytes), " between tiers"));
  row("speed", absl::StrFormat("prompt %.0f tokens/s, generation %.1f tokens/s, by %s",
                               r.prompt_tokens_per_second, r.generated_tokens_per_second, r.way));
  if (r.f16_perplexity > 0) {
    row("perplexity",
        absl::StrFormat("%.4f, with f16 %.4f (%+.2f %%), same %d tokens", r.perplexity, r.f16_perplexity,
                        100 * (r.perplexity / r.f16_perplexity - 1), r.prompt_tokens));
  } else {
    row("perplexity", absl::StrFormat("%.4f", r.perplexity));
  }
  for (const DemoReuse::Way& way : r.reuse.ways)
    row("first token",
        absl::StrFormat("%.2f s %s instead of %.2f s (%.0f %%): %d of %d tokens were in the %s tier",
                        way.seconds, way.what, r.reuse.computed_seconds,
                        100 * way.seconds / r.reuse.computed_seconds, way.reused_tokens,
                        r.reuse.prompt_tokens, way.tier));
  row("continuation", r.AllSame() ? "the same tokens from every tier" : "DIFFERS after a move");
  std::string text = table.Render(terminal);
  text.erase(0, text.find('\n') + 1);  // no titles
  return text;
}

std::string RenderDemoJson(const DemoReport& r) {
  ordered_json json = {{"model", r.model},
                       {"parameters", r.parameters},
                       {"text", r.text},
                       {"way", r.way},
                       {"context", r.context},
                       {"device_tier_bytes", r.device_memory_bytes},
                       {"host_tier_bytes", r.host_memory_bytes},
                       {"pair", r.pair},
                       {"pair_reason", r.pair_reason},
                       {"pair_measured", r.pair_measured},
                       {"f16_bytes", r.f16_bytes},
                       {"planned_bytes", r.planned_bytes},
                       {"stored_bytes", r.stored_bytes},
                       {"stored_tokens", r.stored_tokens},
                       {"predicted_bytes", r.predicted_bytes},
                       {"bytes_per_token", BytesPerToken(r)},
                       {"f16_bytes_per_token", r.f16_bytes_per_token},
                       {"prompt_tokens", r.prompt_tokens},
                       {"generated_tokens", r.generated_tokens},
                       {"prompt_tokens_per_second", r.prompt_tokens_per_second},
                       {"generated_tokens_per_second", r.generated_tokens_per_second},
                       {"perplexity", r.perplexity},
                       {"f16_perplexity", r.f16_perplexity},
                       {"generated", r.generated},
                       {"seed", r.seed},
                       {"tiers", ordered_json::array()},
                       {"steps", ordered_json::array()},
                       {"prefix_reuse", ReuseJson(r.reuse)},
                       {"moves", r.moves},
                       {"moved_bytes", r.moved_bytes},
                       {"same_tokens", r.AllSame()}};
  for (const DemoTier& tier : r.tiers) {
    json["tiers"].push_back({{"name", tier.name},
                             {"capacity_bytes", tier.capacity_bytes},
                             {"used_bytes", tier.used_bytes},
                             {"blocks", tier.blocks}});
  }
  for (const DemoStep& step : r.steps) {
    ordered_json entry = {
        {"name", step.name}, {"what", step.what}, {"blocks", step.blocks}, {"bytes", step.bytes}};
    if (step.checked) entry["same_tokens"] = step.same_tokens;
    json["steps"].push_back(std::move(entry));
  }
  return JsonText(json, 1);
}

}  // namespace kvtide::cli
