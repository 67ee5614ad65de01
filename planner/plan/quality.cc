#include "planner/plan/quality.h"

#include <algorithm>
#include <cstdlib>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/format/catalogue.h"
#include "planner/csv.h"
#include "planner/embedded.h"
#include "planner/engines/engine.h"
#include "planner/model/catalogue.h"
#include "planner/near_names.h"

namespace kvtide::planner {
namespace {

constexpr char kAfterRope[] = "@after-rope";

absl::StatusOr<QualityRow> ReadRow(const CsvRow& csv) {
  QualityRow row;
  row.model = csv.Text("model");
  row.text = csv.Text("text");
  row.pair = {csv.Text("pair_k"), csv.Text("pair_v")};
  const std::string profile = csv.Text("key_profile");
  row.key_profile = std::string(absl::StripSuffix(profile, kAfterRope));
  row.after_rope = row.key_profile != profile;
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
// The catalogue's model of that name, or the bundled one of `kvtide eval`.
constexpr char kBundled[] = "tidelm-7m";

void ResolveModel(QualityRow* row) {
  if (NormalName(row->model) == NormalName(kBundled)) {
    row->shape = {128, 2, KeyTraitsOfFamily(kBundled)};
    return;
  }
  const absl::StatusOr<ModelGeometry> model = FindModel(row->model);
  if (!model.ok()) return;
  row->model = model->name;
  row->shape = KeyShapeOf(*model);
}

std::string StoredName(const TypePair& pair) { return absl::StrCat(StoredAs(pair.k), "/", StoredAs(pair.v)); }

bool HasCalibratedKeys(const TypePair& pair) {
  const absl::StatusOr<CacheType> k = ParseCacheType(pair.k);
  return k.ok() && Info(*k).calibrated;
}

// A change below zero is noise of the text, not a gain.
double Loss(double ppl_change_percent) { return std::max(0.0, ppl_change_percent); }

}  // namespace

absl::StatusOr<std::vector<QualityRow>> ParseQualityCsv(const std::string& csv,
                                                        const std::string& file_name) {
  KVTIDE_ASSIGN_OR_RETURN(
      const std::vector<CsvRow> lines,
      ParseCsv(csv, file_name, {"model", "pair_k", "pair_v", "window_policy", "ppl_change_percent"}));
  std::vector<QualityRow> rows;
  for (const CsvRow& line : lines) {
    KVTIDE_ASSIGN_OR_RETURN(QualityRow row, ReadRow(line));
    ResolveModel(&row);
    rows.push_back(std::move(row));
  }
  return rows;
}

const std::vector<QualityRow>& BuiltInQuality() {
  static const absl::StatusOr<std::vector<QualityRow>> rows = ParseQualityCsv(kQualityCsv, "quality.csv");
  KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
  return *rows;
}

HarmTable::HarmTable(const std::vector<QualityRow>& rows, const ModelGeometry& model,
                     const std::string& window_policy, bool accept_proxy, const CalibratedKeys* keys) {
  const KeyShape shape = KeyShapeOf(model);
  std::vector<std::string> apart;  // differences from each model that is not like it
  for (const QualityRow& row : rows) {
    if (row.window_policy != window_policy || (keys == nullptr && !row.key_profile.empty())) continue;
    if (keys != nullptr && HasCalibratedKeys(row.pair) && row.after_rope != keys->after_rope) continue;
    if (keys != nullptr && !HasCalibratedKeys(row.pair) && !row.key_profile.empty() && !keys->means) continue;
    auto known =
        std::find_if(models_.begin(), models_.end(), [&](const Model& m) { return m.name == row.model; });
    if (known == models_.end()) {
      Model added;
      added.name = row.model;
      added.own = NormalName(row.model) == NormalName(model.name);
      if (!added.own) {
        const std::vector<std::string> differences = Differences(shape, row.shape);
        added.resembles = differences.empty();
        if (!added.resembles)
          apart.push_back(absl::StrCat(row.model, ": ", absl::StrJoin(differences, ", ")));
      }
      known = models_.insert(models_.end(), std::move(added));
    }
    known->rows.push_back({StoredName(row.pair), row.context, Loss(row.ppl_change_percent), row.text,
                           row.tokens, row.key_profile, row.after_rope});
  }
  PreferCalibrated();
  const auto keep = [&](auto counts) {
    std::vector<Model> kept;
    for (Model& m : models_)
      if (counts(m)) kept.push_back(std::move(m));
    models_ = std::move(kept);
  };
  if (!accept_proxy) keep([](const Model& m) { return m.own; });
  const bool like = std::any_of(models_.begin(), models_.end(), [](const Model& m) { return m.resembles; });
  if (like) keep([](const Model& m) { return m.resembles; });
  if (!like && !models_.empty()) differences_ = absl::StrJoin(apart, "; ");
  for (const Model& m : models_) {
    ratios_.emplace_back();
    for (const Model& other : models_) ratios_.back().push_back(Ratio(m, other));
  }
}

void HarmTable::PreferCalibrated() {
  for (Model& model : models_) {
    std::set<std::string> calibrated;  // pairs
    for (const Measured& row : model.rows)
      if (!row.key_profile.empty()) calibrated.insert(row.pair);
    std::erase_if(model.rows, [&](const Measured& row) {
      return row.key_profile.empty() && calibrated.count(row.pair) > 0;
    });
  }
}

const HarmTable::Model* HarmTable::Own() const {
  const auto own = std::find_if(models_.begin(), models_.end(), [](const Model& m) { return m.own; });
  return own == models_.end() ? nullptr : &*own;
}

const HarmTable::Measured* HarmTable::Nearest(const Model& model, const std::string& pair, int64_t context) {
  const Measured* nearest = nullptr;
  for (const Measured& row : model.rows) {
    if (row.pair != pair) continue;
    const int64_t distance = std::llabs(row.context - context);
    const int64_t best = nearest == nullptr ? INT64_MAX : std::llabs(nearest->context - context);
    if (distance < best || (distance == best && row.percent > nearest->percent)) nearest = &row;
  }
  return nearest;
}

double HarmTable::Ratio(const Model& model, const Model& other) {
  constexpr double kNoise = 0.02;  // percent: below, a ratio says nothing
  constexpr size_t kFewest = 2;    // pairs
  std::vector<double> ratios;
  for (const Measured& row : model.rows) {
    const Measured* same = Nearest(other, row.pair, row.context);
    if (same != nullptr && same->key_profile.empty() != row.key_profile.empty()) continue;
    if (same != nullptr && same->percent > kNoise) ratios.push_back(row.percent / same->percent);
  }
  if (ratios.size() < kFewest) return 0;
  const auto middle = ratios.begin() + static_cast<std::ptrdiff_t>(ratios.size() / 2);
  std::nth_element(ratios.begin(), middle, ratios.end());
  return *middle;
}

Harm HarmTable::Find(const TypePair& pair, int64_t context) const {
  Harm harm;
  if (IsYardstick(pair)) {
    harm.measured = true;
    return harm;
  }
  const std::string stored = StoredName(pair);
  const Model* own = Own();
  const Measured* mine = own == nullptr ? nullptr : Nearest(*own, stored, context);
  for (const Model& model : models_) {
    if (mine != nullptr && !model.own) continue;
    const Measured* row = Nearest(model, stored, context);
    if (row != nullptr && !row->key_profile.empty()) harm.calibrated = true;
    if (row == nullptr || (harm.measured && row->percent <= harm.ppl_change_percent)) continue;
    harm.measured = true;
    harm.proxy = !model.own;
    harm.ppl_change_percent = harm.expected_percent = row->percent;
    harm.model = model.name;
    harm.context = row->context;
    harm.text = row->text;
    harm.tokens = row->tokens;
    harm.key_profile = row->key_profile;
    harm.after_rope = row->after_rope;
    harm.resembles = model.resembles;
  }
  if (!harm.measured || mine != nullptr) return harm;
  // Models that measured other pairs only: the asked one itself, or one that resembles it.
  for (size_t i = 0; i < models_.size(); ++i) {
    if (Nearest(models_[i], stored, context) != nullptr || (own != nullptr && !models_[i].own)) continue;
    for (size_t j = 0; j < models_.size(); ++j) {
      const Measured* row = Nearest(models_[j], stored, context);
      if (row == nullptr || row->percent * ratios_[i][j] <= harm.expected_percent) continue;
      harm.expected_percent = row->percent * ratios_[i][j];
      harm.expected_of = models_[i].name;
    }
  }
  return harm;
}

}  // namespace kvtide::planner
