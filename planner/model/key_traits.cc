#include "planner/model/key_traits.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "planner/csv.h"
#include "planner/embedded.h"
#include "planner/near_names.h"

namespace kvtide::planner {
namespace {

constexpr int kHeadDimFactor = 2, kGroupFactor = 4;

struct Family {
  std::string prefix;  // in NormalName's form
  KeyTraits traits;
};

Answer AnswerOf(const std::string& word) {
  return word == "yes" ? Answer::kYes : word == "no" ? Answer::kNo : Answer::kUnknown;
}

const std::vector<Family>& Families() {
  static const std::vector<Family> families = [] {
    const auto rows = ParseCsv(kFamiliesCsv, "families.csv", {"family", "norm", "bias"});
    KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
    std::vector<Family> list;
    for (const CsvRow& row : *rows) {
      list.push_back(
          {NormalName(row.Text("family")), {AnswerOf(row.Text("norm")), AnswerOf(row.Text("bias"))}});
    }
    return list;
  }();
  return families;
}

bool Apart(int a, int b, int factor) {
  return a > 0 && b > 0 && (a > int64_t{b} * factor || b > int64_t{a} * factor);
}

bool Unlike(Answer a, Answer b) { return a != Answer::kUnknown && b != Answer::kUnknown && a != b; }

}  // namespace

KeyTraits KeyTraitsOfFamily(const std::string& name) {
  const std::string wanted = NormalName(name);
  const Family* best = nullptr;
  for (const Family& family : Families()) {
    if (absl::StartsWith(wanted, family.prefix) &&
        (best == nullptr || family.prefix.size() > best->prefix.size()))
      best = &family;
  }
  return best != nullptr ? best->traits : KeyTraits{};
}

KeyShape KeyShapeOf(const ModelGeometry& model) {
  KeyShape shape;
  shape.traits = model.key_traits;
  for (const LayerGeometry& layer : model.layers) {
    if (!layer.OwnsCache()) continue;
    if (layer.kind == LayerKind::kMla) return shape;
    shape.head_dim = layer.head_dim_k;
    shape.group = layer.n_kv_heads > 0 ? model.n_query_heads / layer.n_kv_heads : 0;
    return shape;
  }
  return shape;
}

std::vector<std::string> Differences(const KeyShape& model, const KeyShape& measured) {
  std::vector<std::string> differences;
  if (Apart(model.head_dim, measured.head_dim, kHeadDimFactor))
    differences.push_back(absl::StrCat("head dim ", model.head_dim, ", not ", measured.head_dim));
  if (Apart(model.group, measured.group, kGroupFactor))
    differences.push_back(absl::StrCat(model.group, " query heads per KV head, not ", measured.group));
  if (Unlike(model.traits.norm, measured.traits.norm))
    differences.push_back(model.traits.norm == Answer::kYes ? "keys with a norm" : "keys without a norm");
  if (Unlike(model.traits.bias, measured.traits.bias))
    differences.push_back(model.traits.bias == Answer::kYes ? "keys with biases" : "keys without biases");
  return differences;
}

}  // namespace kvtide::planner
