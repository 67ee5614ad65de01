#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cli/eval/eval_captured.h"
#include "clients/cli/eval/eval_plot.h"
#include "clients/cli/eval/eval_text.h"
#include "clients/cli/terminal/json_text.h"
#include "clients/cli/terminal/report_parts.h"
#include "clients/cli/terminal/table.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {
namespace {

using nlohmann::ordered_json;

std::string CsvLine(const CapturedReport& report, const CapturedRow& row, const std::string& layer,
                    const LayerError& e) {
  const size_t slash = row.pair.find('/');
  return absl::StrCat(
      CsvCell(report.model), ",", CsvCell(report.text), ",", report.tokens, ",", layer, ",",
      row.pair.substr(0, slash), ",", row.pair.substr(slash + 1), ",", report.window_policy, ",",
      absl::StrFormat("%.5g,%.5g,%.5g,%.5g,%.7f,%.5g,%.5f,%.4f", e.key, e.value, e.logit, e.output,
                      e.output_cosine, e.weight_kld, e.weight_top1, row.bits_per_value),
      ",", report.version, ",", report.date, "\n");
}

}  // namespace

void SortAndMark(std::vector<CapturedRow>* rows) {
  SortAndMarkPareto(rows, [](const CapturedRow& row) { return row.mean.output; });
}

std::string RenderTable(const CapturedReport& report, const Terminal& terminal) {
  Table table({{"pair", Align::kLeft},
               {"bits/value"},
               {"vs f16"},
               {"K error"},
               {"V error"},
               {"logits"},
               {"output"},
               {"cosine"},
               {"weights KLD"},
               {"same top-1"},
               {"", Align::kLeft}});
  for (const CapturedRow& row : report.rows) {
    const LayerError& e = row.mean;
    table.AddRow({row.pair, absl::StrFormat("%.3f", row.bits_per_value),
                  absl::StrFormat("%.2fx", 16 / row.bits_per_value), absl::StrFormat("%.3f %%", 100 * e.key),
                  absl::StrFormat("%.3f %%", 100 * e.value), absl::StrFormat("%.3f %%", 100 * e.logit),
                  absl::StrFormat("%.3f %%", 100 * e.output), absl::StrFormat("%.6f", e.output_cosine),
                  absl::StrFormat("%.2e", e.weight_kld), absl::StrFormat("%.2f %%", 100 * e.weight_top1),
                  row.pareto ? "* Pareto" : ""},
                 row.pareto ? Paint::kGreen : Paint::kPlain);
  }
  return absl::StrCat(
      report.model.empty() ? report.file : report.model, report.text.empty() ? "" : " on ", report.text, ": ",
      report.tokens, " tokens, ", report.rows.empty() ? 0 : report.rows.front().layers.size(),
      " layers, queries at the last ", report.queries, " tokens, exact window ", report.window_policy,
      ", key centring ", report.key_centring, "\n", table.Render(terminal),
      terminal.Painted(
          "Means over layers of errors relative to the exact vectors. K, V, logits: every token coded; "
          "output, cosine, weights, top-1: attention with the exact window.\n",
          Paint::kDim));
}

std::string RenderJson(const CapturedReport& report) {
  ordered_json json = {{"file", report.file},
                       {"model", report.model},
                       {"text", report.text},
                       {"tokens", report.tokens},
                       {"queries", report.queries}};
  AddConditions(report, &json);
  for (const CapturedRow& row : report.rows) {
    ordered_json result = {{"pair", row.pair}, {"bits_per_value", Rounded(row.bits_per_value, 6)}};
    result.update(LayerErrorJson(row.mean));
    result["pareto"] = row.pareto;
    if (!row.layers.empty()) result["layers"] = LayersJson(row.layers);
    json["results"].push_back(std::move(result));
  }
  return JsonText(json, 1);
}

std::string RenderCsv(const CapturedReport& report) {
  std::string csv =
      "model,text,tokens,layer,pair_k,pair_v,window_policy,key_error,value_error,logit_error,output_error,"
      "output_cosine,weight_kld,weight_top1,bits_per_value,version,date\n";
  for (const CapturedRow& row : report.rows) {
    csv += CsvLine(report, row, "all", row.mean);
    for (size_t l = 0; l < row.layers.size(); ++l)
      csv += CsvLine(report, row, absl::StrCat(l), row.layers[l]);
  }
  return csv;
}

std::string RenderSvg(const CapturedReport& report) {
  std::vector<PlotPoint> points;
  for (const CapturedRow& row : report.rows) {
    if (row.pair == "f16/f16") continue;
    points.push_back({row.pair, absl::StrFormat("cosine %.6f", row.mean.output_cosine), row.bits_per_value,
                      row.mean.output, row.pareto});
  }
  return RenderHarmPlot(
      absl::StrCat(report.model.empty() ? report.file : report.model, ": harm against size"),
      absl::StrCat(report.text, report.text.empty() ? "" : ", ", report.tokens, " tokens, exact window ",
                   report.window_policy),
      "relative error of the attention output, mean over layers", points);
}

}  // namespace kvtide::cli
