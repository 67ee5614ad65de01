#include "clients/cli/eval/eval_report.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cli/eval/eval_plot.h"
#include "clients/cli/eval/eval_text.h"
#include "clients/cli/terminal/json_text.h"
#include "clients/cli/terminal/report_parts.h"
#include "clients/cli/terminal/table.h"
#include "kernels/format/catalogue.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {
namespace {

using nlohmann::ordered_json;

bool IsYardstick(const EvalRow& row) { return row.pair == "f16/f16"; }

// Of a row, as quality.h has it. Keys in f16 and the fp8 of servers know no profile.
std::string KeyProfileOf(const EvalReport& report, const EvalRow& row) {
  const absl::StatusOr<CachePair> pair = ParseCachePair(row.pair);
  if (!pair.ok() || Info(pair->k).storage == Storage::kHalf) return "";
  return report.after_rope && Info(pair->k).calibrated ? report.key_profile + "@after-rope"
                                                       : report.key_profile;
}

ordered_json RowJson(const EvalRow& row) {
  ordered_json json = {{"pair", row.pair},
                       {"perplexity", Rounded(row.perplexity, 8)},
                       {"change_percent", Rounded(row.change_percent, 6)},
                       {"kld_mean", Rounded(row.kld_mean, 6)},
                       {"kld_p99", Rounded(row.kld_p99, 3)},
                       {"top1_agreement", Rounded(row.top1_agreement, 6)},
                       {"bits_per_value", Rounded(row.bits_per_value, 6)},
                       {"pareto", row.pareto}};
  if (!row.layers.empty()) json["layers"] = LayersJson(row.layers);
  for (const NeedleScore& needle : row.needles) {
    json["needles"].push_back({{"depth", Rounded(needle.depth, 4)},
                               {"asked", needle.asked},
                               {"found", needle.found},
                               {"log_likelihood", Rounded(needle.log_likelihood, 5)}});
  }
  return json;
}

}  // namespace

void SortAndMark(std::vector<EvalRow>* rows) {
  SortAndMarkPareto(rows, [](const EvalRow& row) { return row.kld_mean; });
}

std::string RenderTable(const EvalReport& report, const Terminal& terminal) {
  const bool needles = std::any_of(report.rows.begin(), report.rows.end(),
                                   [](const EvalRow& r) { return !r.needles.empty(); });
  std::vector<Table::Column> columns = {
      {"pair", Align::kLeft}, {"bits/value"}, {"vs f16"},    {"perplexity"}, {"change"},
      {"mean KLD"},           {"p99 KLD"},    {"same top-1"}};
  if (needles) columns.push_back({"needles"});
  columns.push_back({"", Align::kLeft});
  Table table(columns);
  for (const EvalRow& row : report.rows) {
    std::vector<std::string> cells = {
        row.pair,
        absl::StrFormat("%.3f", row.bits_per_value),
        absl::StrFormat("%.2fx", 16 / row.bits_per_value),
        absl::StrFormat("%.4f", row.perplexity),
        IsYardstick(row) ? "" : absl::StrFormat("%+.3f %%", row.change_percent),
        IsYardstick(row) ? "" : absl::StrFormat("%.2e", row.kld_mean),
        IsYardstick(row) ? "" : absl::StrFormat("%.2e", row.kld_p99),
        IsYardstick(row) ? "" : absl::StrFormat("%.2f %%", 100 * row.top1_agreement)};
    if (needles) {
      int64_t asked = 0, found = 0;
      for (const NeedleScore& needle : row.needles) {
        asked += needle.asked;
        found += needle.found;
      }
      cells.push_back(absl::StrCat(found, "/", asked));
    }
    cells.push_back(row.pareto ? "* Pareto" : "");
    table.AddRow(std::move(cells), row.pareto ? Paint::kGreen : Paint::kPlain);
  }
  return absl::StrCat(
      report.model, " on ", report.text, ": ", report.windows, " windows of ", report.context,
      " tokens, exact window ", report.window_policy, ", key centring ", report.key_centring, "\n",
      table.Render(terminal),
      terminal.Painted(
          "Bits count everything that the daemon holds for a sequence of this length. KLD: divergence from "
          "f16's prediction, nats per token.\n",
          Paint::kDim));
}

std::string RenderJson(const EvalReport& report) {
  ordered_json json = {{"model", report.model},     {"parameters", report.parameters},
                       {"text", report.text},       {"tokens", report.tokens},
                       {"windows", report.windows}, {"context", report.context},
                       {"chunk", report.chunk}};
  AddConditions(report, &json);
  if (!report.key_profile.empty()) {
    json["key_profile"] = report.key_profile;
    json["after_rope"] = report.after_rope;
  }
  for (const EvalRow& row : report.rows) json["results"].push_back(RowJson(row));
  return JsonText(json, 1);
}

std::string RenderCsv(const EvalReport& report) {
  std::string csv =
      "model,text,tokens,context,pair_k,pair_v,window_policy,ppl_change_percent,kld_mean,kld_p99,top1_"
      "agreement,"
      "bits_per_value,version,date,key_profile\n";
  for (const EvalRow& row : report.rows) {
    if (IsYardstick(row)) continue;
    const size_t slash = row.pair.find('/');
    absl::StrAppend(&csv, CsvCell(report.model), ",", CsvCell(report.text), ",", report.tokens, ",",
                    report.context, ",", row.pair.substr(0, slash), ",", row.pair.substr(slash + 1), ",",
                    report.window_policy, ",");
    absl::StrAppendFormat(&csv, "%.4f,%.4g,%.3g,%.5f,%.4f,%s,%s,%s\n", row.change_percent, row.kld_mean,
                          row.kld_p99, row.top1_agreement, row.bits_per_value, report.version, report.date,
                          CsvCell(KeyProfileOf(report, row)));
  }
  return csv;
}

std::string RenderSvg(const EvalReport& report) {
  std::vector<PlotPoint> points;
  for (const EvalRow& row : report.rows) {
    if (IsYardstick(row)) continue;
    points.push_back({row.pair, absl::StrFormat("%+.3f %% perplexity", row.change_percent),
                      row.bits_per_value, row.kld_mean, row.pareto});
  }
  return RenderHarmPlot(absl::StrCat(report.model, ": harm against size"),
                        absl::StrCat(report.text, ", ", report.windows, " windows of ", report.context,
                                     " tokens, exact window ", report.window_policy),
                        "mean divergence from f16, nats per token", points);
}

}  // namespace kvtide::cli
