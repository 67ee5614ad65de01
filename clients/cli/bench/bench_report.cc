#include "clients/cli/bench/bench_report.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cli/eval/eval_text.h"
#include "clients/cli/ops/status_report.h"
#include "clients/cli/terminal/json_text.h"
#include "clients/cli/terminal/table.h"
#include "nlohmann/json.hpp"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

std::string TimeText(double seconds) {
  return seconds < 100e-6 ? absl::StrFormat("%.1f us", seconds * 1e6) : LatencyText(seconds);
}

std::string SpeedText(const BenchRow& row) {
  return row.bytes == 0 ? "" : absl::StrFormat("%.2f", row.bytes_per_second() / 1e9);
}

// Latencies as a multiple of the bound, bandwidths as a share of it.
std::string ShareText(const BenchReport& report, const BenchRow& row) {
  const double share = report.ShareOfRoofline(row);
  if (share <= 0) return "";
  return row.bytes == 0 ? absl::StrFormat("%.1fx the time of %s", 1 / share, row.roofline)
                        : absl::StrFormat("%.0f %% of %s", 100 * share, row.roofline);
}

}  // namespace

std::string RenderTable(const BenchReport& report, const Terminal& terminal) {
  std::string text = absl::StrFormat("kvtided %s (%s) on %s, device %s, %s\n", report.version,
                                     report.daemon == "its own" ? "its own" : Printable(report.daemon),
                                     report.machine, report.device, report.date);
  for (const BenchPart part : {BenchPart::kRoofline, BenchPart::kWay, BenchPart::kTier}) {
    const bool bound = part == BenchPart::kRoofline;
    std::vector<Table::Column> columns = {{bound                     ? "without kvtide"
                                           : part == BenchPart::kWay ? "way"
                                                                     : absl::StrCat("tier, ", report.pair),
                                           Align::kLeft},
                                          {"call", Align::kLeft},
                                          {"bytes"},
                                          {"p50"},
                                          {"p99"},
                                          {"GB/s"}};
    columns.push_back({bound ? "" : "of what the machine does", Align::kLeft});
    Table table(columns);
    std::string notes;
    for (const BenchRow& row : report.rows) {
      if (row.part != part) continue;
      if (row.samples == 0) {
        absl::StrAppend(&notes, row.subject, row.call.empty() ? "" : ", ", row.call, ": not measured",
                        row.note.empty() ? "" : ": ", Printable(row.note), "\n");
        continue;
      }
      table.AddRow({row.subject, row.call, row.bytes == 0 ? "" : planner::FormatBytes(row.bytes),
                    TimeText(row.p50_seconds), TimeText(row.p99_seconds), SpeedText(row),
                    bound ? row.note : ShareText(report, row)});
    }
    absl::StrAppend(&text, "\n", table.empty() ? "" : table.Render(terminal), notes);
  }
  if (!report.disk_folder.empty())
    absl::StrAppend(&text, "\nfiles lie in ", Printable(report.disk_folder), "\n");
  return text;
}

std::string RenderJson(const BenchReport& report) {
  using Json = nlohmann::ordered_json;
  Json rows = Json::array();
  for (const BenchRow& row : report.rows) {
    Json json = {
        {"part", NameOf(row.part)}, {"subject", row.subject}, {"call", row.call}, {"samples", row.samples}};
    if (row.samples > 0) {
      json["p50_seconds"] = Rounded(row.p50_seconds, 4);
      json["p99_seconds"] = Rounded(row.p99_seconds, 4);
      if (row.bytes > 0) {
        json["bytes"] = row.bytes;
        json["bytes_per_second"] = Rounded(row.bytes_per_second(), 4);
      }
      if (const double share = report.ShareOfRoofline(row); share > 0) {
        json["roofline"] = row.roofline;
        json["share_of_roofline"] = Rounded(share, 4);
      }
    }
    if (!row.note.empty()) json["note"] = row.note;
    rows.push_back(std::move(json));
  }
  const Json json = {{"version", report.version},
                     {"daemon", report.daemon},
                     {"machine", report.machine},
                     {"date", report.date},
                     {"device", report.device},
                     {"pair", report.pair},
                     {"disk_folder", report.disk_folder},
                     {"seconds", Rounded(report.seconds, 4)},
                     {"results", rows}};
  return JsonText(json, 1);
}

}  // namespace kvtide::cli
