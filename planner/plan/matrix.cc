#include "planner/plan/matrix.h"

#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "planner/engines/llama_cpp.h"

namespace kvtide::planner {
namespace {

int64_t ScratchPerToken(Engine engine, const TypePair& pair, int head_dim) {
  if (engine != Engine::kLlamaCpp) return 0;
  int64_t bytes = 0;
  for (const std::string& name : {pair.k, pair.v}) {
    const GgmlType* type = FindGgmlType(name);
    if (type == nullptr || type->half()) continue;
    bytes += 2 * (type->group == 128 ? (head_dim + 127) / 128 * 128 : head_dim);
  }
  return bytes;
}

}  // namespace

std::vector<MatrixRow> SupportMatrix(const EngineOptions& options, const std::vector<TypePair>& pairs,
                                     const std::vector<int>& head_dims) {
  std::vector<MatrixRow> rows;
  for (const TypePair& pair : pairs) {
    for (int head_dim : head_dims) {
      rows.push_back({pair, head_dim, FindSupport(options, pair, head_dim, head_dim),
                      ScratchPerToken(options.engine, pair, head_dim)});
    }
  }
  return rows;
}

std::string RenderMatrix(const std::vector<MatrixRow>& rows) {
  std::string text = absl::StrFormat("%-18s %8s %-12s %-12s %s\n", "pair", "head dim", "kernel", "build",
                                     "f16 scratch, B per token and KV head of one layer");
  std::vector<std::string> reasons;
  std::set<std::string> seen;
  for (const MatrixRow& row : rows) {
    absl::StrAppendFormat(&text, "%-18s %8d %-12s %-12s %d\n", row.pair.Name(), row.head_dim,
                          SupportLevelName(row.support.level), row.support.build,
                          row.scratch_bytes_per_token);
    const std::string reason = absl::StrCat(SupportLevelName(row.support.level), ": ", row.support.reason);
    if (!row.support.reason.empty() && seen.insert(reason).second) reasons.push_back(reason);
  }
  for (const std::string& reason : reasons) absl::StrAppend(&text, reason, "\n");
  return text;
}

}  // namespace kvtide::planner
