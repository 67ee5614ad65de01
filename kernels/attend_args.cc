#include "kernels/attend_args.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

absl::Status CheckRun(const BlockRun& run, const GroupShape& shape, int64_t end_of_last) {
  if (run.layout == nullptr) return absl::InvalidArgumentError("no layout");
  if (!(run.layout->shape() == shape))
    return absl::InvalidArgumentError("its shape is not that of the first run");
  if (run.first_position < 0 || run.first_position > kMostPosition || run.tokens < 0 ||
      run.tokens > kMostPosition - run.first_position)
    return absl::InvalidArgumentError(absl::StrCat(run.tokens, " tokens from position ", run.first_position,
                                                   ": positions are 0 to ", kMostPosition - 1));
  if (BlocksOf(run) > static_cast<int64_t>(run.blocks.size()))
    return absl::InvalidArgumentError(absl::StrCat(run.tokens, " tokens in ", run.blocks.size(), " blocks"));
  if (run.tokens > 0 && run.first_position < end_of_last)
    return absl::InvalidArgumentError(absl::StrCat("it begins at position ", run.first_position,
                                                   ", the run before it ends at ", end_of_last,
                                                   ": runs stand in the order of their positions"));
  if (run.profile != nullptr &&
      run.profile->k.size() != static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads))
    return absl::InvalidArgumentError("the profile does not have one entry per layer and KV head");
  return run.tokens > 0 ? CheckProfileFor(run.layout->pair().k, shape, run.profile) : absl::OkStatus();
}

template <class Items>
const GroupShape* ShapeOf(const Items& items) {
  for (const auto& item : items)
    for (const BlockRun& run : item.runs)
      if (run.layout != nullptr) return &run.layout->shape();
  return nullptr;
}

// What does not depend on the layer; Items are of PlanItem or AttendItem.
template <class Items>
absl::StatusOr<AttendShape> CheckItems(const Items& items, int heads, int64_t window) {
  AttendShape shape;
  shape.heads = heads;
  if (items.empty()) return shape;
  const GroupShape* group = ShapeOf(items);
  if (group == nullptr)
    return absl::InvalidArgumentError(
        "no item has a run; pass one of 0 tokens, it says the shape of the heads");
  shape.group = *group;
  if (heads <= 0 || heads % group->kv_heads != 0)
    return absl::InvalidArgumentError(absl::StrCat(heads, " query heads: must be a positive multiple of the ",
                                                   group->kv_heads, " KV heads"));
  if (window < 0)
    return absl::InvalidArgumentError(absl::StrCat("window ", window, ": must be positive, or 0 for none"));
  shape.queries.reserve(items.size());
  for (size_t i = 0; i < items.size(); i++) {
    const auto& item = items[i];
    if (item.queries < 0 || item.queries > kMostRows / heads)
      return absl::InvalidArgumentError(absl::StrCat("item ", i, ": ", item.queries, " queries of ", heads,
                                                     " heads: 0 to ", kMostRows,
                                                     " rows are possible; send them in pieces"));
    if (item.first_query_position < 0 || item.first_query_position > kMostPosition - item.queries)
      return absl::InvalidArgumentError(absl::StrCat("item ", i, ": ", item.queries,
                                                     " queries from position ", item.first_query_position,
                                                     ": positions are 0 to ", kMostPosition - 1));
    int64_t end = 0;
    for (size_t r = 0; r < item.runs.size(); r++) {
      const absl::Status status = CheckRun(item.runs[r], *group, end);
      if (!status.ok()) return Annotate(status, absl::StrCat("item ", i, ", run ", r));
      if (item.runs[r].tokens > 0) end = item.runs[r].first_position + item.runs[r].tokens;
    }
    shape.queries.push_back(item.queries);
  }
  return shape;
}

absl::Status CheckNumbers(int layer, float scale, float softcap, const float* sinks,
                          const AttendShape& shape) {
  if (layer < 0 || layer >= shape.group.layers)
    return absl::InvalidArgumentError(absl::StrCat("layer ", layer, " of ", shape.group.layers));
  if (!std::isfinite(scale))
    return absl::InvalidArgumentError(absl::StrCat("scale ", scale, ": must be finite"));
  if (!(softcap >= 0 && softcap <= kMostSoftcap))
    return absl::InvalidArgumentError(
        absl::StrCat("soft-cap ", softcap, ": must be 0 (none) to ", kMostSoftcap));
  for (int h = 0; sinks != nullptr && h < shape.heads; h++)
    if (std::isnan(sinks[h]) || sinks[h] == INFINITY)
      return absl::InvalidArgumentError(
          absl::StrCat("sink ", sinks[h], " of head ", h, ": must be a number or -infinity"));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<AttendShape> CheckAttendPlan(const AttendPlanArgs& args) {
  return CheckItems(args.items, args.heads, args.window);
}

absl::Status CheckAttendLayer(const AttendLayerArgs& args, const AttendShape& shape) {
  if (args.items.size() != shape.queries.size())
    return absl::InvalidArgumentError(
        absl::StrCat(args.items.size(), " items for a plan of ", shape.queries.size()));
  if (args.items.empty()) return absl::OkStatus();
  KVTIDE_RETURN_IF_ERROR(CheckNumbers(args.layer, args.scale, args.softcap, args.sinks, shape));
  for (size_t i = 0; i < args.items.size(); i++)
    if (shape.queries[i] > 0 && (args.items[i].q.data == nullptr || args.items[i].out.data == nullptr))
      return absl::InvalidArgumentError(
          absl::StrCat("item ", i, ": q and out are needed for ", shape.queries[i], " queries"));
  return absl::OkStatus();
}

absl::Status AppendFirst(Backend& backend, const AttendLayerArgs& args) {
  if (args.append.empty()) return absl::OkStatus();
  AppendArgs rows;
  rows.pieces = args.append;
  return backend.Append(rows);
}

absl::Status RunMeanwhile(const AttendLayerArgs& args) {
  return args.meanwhile == nullptr ? absl::OkStatus() : (*args.meanwhile)();
}

absl::StatusOr<AttendShape> CheckAttendArgs(const AttendArgs& args) {
  KVTIDE_ASSIGN_OR_RETURN(AttendShape shape, CheckItems(args.items, args.heads, args.window));
  if (args.items.empty()) return shape;
  KVTIDE_RETURN_IF_ERROR(CheckNumbers(args.layer, args.scale, args.softcap, args.sinks, shape));
  for (size_t i = 0; i < args.items.size(); i++) {
    const AttendItem& item = args.items[i];
    if (item.queries > 0 && (item.q == nullptr || item.out == nullptr || item.lse == nullptr))
      return absl::InvalidArgumentError(
          absl::StrCat("item ", i, ": q, out and lse are needed for ", item.queries, " queries"));
  }
  return shape;
}

}  // namespace kvtide
