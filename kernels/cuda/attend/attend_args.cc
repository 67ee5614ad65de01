#include "kernels/cuda/attend/attend_args.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace kvtide::cuda {

absl::Status CheckAttendArgs(const AttendArgs& args, const GroupShape** shape) {
  *shape = nullptr;
  for (const AttendItem& item : args.items)
    if (*shape == nullptr && !item.runs.empty() && item.runs[0].layout != nullptr)
      *shape = &item.runs[0].layout->shape();
  if (args.items.empty()) return absl::OkStatus();
  if (*shape == nullptr)
    return absl::InvalidArgumentError(
        "no item has a run; pass one of 0 tokens, it says the shape of the heads");
  const GroupShape& s = **shape;
  if (args.layer < 0 || args.layer >= s.layers)
    return absl::InvalidArgumentError(absl::StrCat("layer ", args.layer, " of ", s.layers));
  if (args.heads <= 0 || args.heads % s.kv_heads != 0)
    return absl::InvalidArgumentError(
        absl::StrCat(args.heads, " query heads over ", s.kv_heads, " KV heads"));
  for (size_t i = 0; i < args.items.size(); i++) {
    const AttendItem& item = args.items[i];
    if (item.queries < 0 ||
        (item.queries > 0 && (item.q == nullptr || item.out == nullptr || item.lse == nullptr)))
      return absl::InvalidArgumentError(absl::StrCat("item ", i, ": queries without q, out or lse"));
    for (const BlockRun& run : item.runs) {
      const std::string where = absl::StrCat("item ", i, ", run ", &run - item.runs.data(), ": ");
      if (run.layout == nullptr) return absl::InvalidArgumentError(where + "no layout");
      if (!(run.layout->shape() == s))
        return absl::InvalidArgumentError(where + "its shape is not that of the first run");
      if (run.tokens < 0 || BlocksOf(run) > static_cast<int64_t>(run.blocks.size()))
        return absl::InvalidArgumentError(
            absl::StrCat(where, run.tokens, " tokens in ", run.blocks.size(), " blocks"));
      if (run.profile != nullptr &&
          run.profile->k.size() != static_cast<size_t>(s.layers) * static_cast<size_t>(s.kv_heads))
        return absl::InvalidArgumentError(where +
                                          "the profile does not have one entry per layer and KV head");
    }
  }
  return absl::OkStatus();
}

PageRange VisiblePages(const AttendArgs& args, const AttendItem& item, int64_t first_position, int64_t tokens,
                       int64_t first, int64_t last) {
  const int64_t base = item.first_query_position - first_position;
  const int64_t end = args.causal ? std::min(tokens, base + last + 1) : tokens;
  const int64_t begin = args.window > 0 ? std::max<int64_t>(0, base + first - args.window + 1) : 0;
  if (begin >= end) return {0, 0};
  return {begin / kBlockTokens, (end + kBlockTokens - 1) / kBlockTokens};
}

}  // namespace kvtide::cuda
