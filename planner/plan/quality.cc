#include "planner/plan/quality.h"

#include <algorithm>
#include <cstdlib>

#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/format/catalogue.h"
#include "planner/csv.h"
#include "planner/embedded.h"

namespace kvtide::planner {
namespace {

absl::StatusOr<QualityRow> ReadRow(const CsvRow& csv) {
  QualityRow row;
  row.model = csv.Text("model");
  row.text = csv.Text("text");
  row.pair = {csv.Text("pair_k"), csv.Text("pair_v")};
  row.window_policy = csv.Text("window_policy");
  if (row.window_policy == "1+2") row.window_policy = "default";
  if (row.window_policy == "0+0") row.window_policy = "none";
  row.version = csv.Text("version");
  row.date = csv.Text("date");
  KVTIDE_ASSIGN_OR_RETURN(row.tokens, csv.Integer("tokens"));
  KVTIDE_ASSIGN_OR_RETURN(row.context, csv.Integer("context"));
  KVTIDE_ASSIGN_OR_RETURN(row.ppl_change_percent, csv.Number("ppl_change_percent"));
  KVTIDE_ASSIGN_OR_RETURN(row.kld_mean, csv.Number("kld_mean"));
  KVTIDE_ASSIGN_OR_RETURN(row.kld_p99, csv.Number("kld_p99"));
  KVTIDE_ASSIGN_OR_RETURN(row.top1_agreement, csv.Number("top1_agreement"));
  KVTIDE_ASSIGN_OR_RETURN(row.bits_per_value, csv.Number("bits_per_value"));
  if (row.model.empty() || row.pair.k.empty() || row.pair.v.empty() ||
      csv.Text("ppl_change_percent").empty()) {
    return absl::InvalidArgumentError(csv.place() +
                                      ": model, pair_k, pair_v and ppl_change_percent must be given");
  }
  return row;
}

bool IsYardstick(const TypePair& pair) {
  return pair == TypePair{"f16", "f16"} || pair == TypePair{"bf16", "bf16"} ||
         pair == TypePair{"f32", "f32"} || pair == TypePair{"f16", "none"} ||
         pair == TypePair{"bf16", "none"};
}

// Types that store the same bytes under another name (pq3 is planar3) share their measurements.
std::string StoredAs(const std::string& type) {
  const auto known = ParseCacheType(type);
  if (!known.ok() || Info(*known).alias_of == nullptr) return type;
  return Info(*known).alias_of;
}
bool SameBytes(const TypePair& a, const TypePair& b) {
  return StoredAs(a.k) == StoredAs(b.k) && StoredAs(a.v) == StoredAs(b.v);
}

int64_t Distance(const QualityRow& row, int64_t context) { return std::llabs(row.context - context); }

Harm HarmOf(const QualityRow& row, bool proxy) {
  // A change below zero is noise of the text, not a gain.
  return {true, proxy, std::max(0.0, row.ppl_change_percent), row.model, row.context};
}

}  // namespace

absl::StatusOr<std::vector<QualityRow>> ParseQualityCsv(const std::string& csv,
                                                        const std::string& file_name) {
  KVTIDE_ASSIGN_OR_RETURN(
      const std::vector<CsvRow> lines,
      ParseCsv(csv, file_name, {"model", "pair_k", "pair_v", "window_policy", "ppl_change_percent"}));
  std::vector<QualityRow> rows;
  for (const CsvRow& line : lines) {
    KVTIDE_ASSIGN_OR_RETURN(QualityRow row, ReadRow(line));
    rows.push_back(std::move(row));
  }
  return rows;
}

const std::vector<QualityRow>& BuiltInQuality() {
  static const absl::StatusOr<std::vector<QualityRow>> rows = ParseQualityCsv(kQualityCsv, "quality.csv");
  KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
  return *rows;
}

Harm FindHarm(const std::vector<QualityRow>& rows, const TypePair& pair, const std::string& model,
              const std::string& window_policy, int64_t context, bool accept_proxy) {
  if (IsYardstick(pair)) return {true, false, 0, "", 0};
  const QualityRow* own = nullptr;
  for (const QualityRow& row : rows) {
    if (!SameBytes(row.pair, pair) || row.window_policy != window_policy || row.model != model) continue;
    if (own == nullptr || Distance(row, context) < Distance(*own, context)) own = &row;
  }
  if (own != nullptr) return HarmOf(*own, false);
  if (!accept_proxy) return {};
  // Of each other model the row nearest in context; of those the worst.
  Harm worst;
  for (const QualityRow& row : rows) {
    if (!SameBytes(row.pair, pair) || row.window_policy != window_policy) continue;
    bool nearest = true;
    for (const QualityRow& other : rows) {
      nearest &= !(SameBytes(other.pair, pair) && other.window_policy == window_policy &&
                   other.model == row.model && Distance(other, context) < Distance(row, context));
    }
    if (!nearest) continue;
    if (!worst.measured || row.ppl_change_percent > worst.ppl_change_percent) worst = HarmOf(row, true);
  }
  return worst;
}

}  // namespace kvtide::planner
