#include "planner/render/explain.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::planner {

absl::StatusOr<std::string> ExplainPair(const PlanRequest& request, const TypePair& pair, int64_t context) {
  PlanRequest one = request;
  one.pairs = {pair};
  one.workload.contexts = {context};
  KVTIDE_ASSIGN_OR_RETURN(const Plan plan, MakePlan(one));
  const Candidate& candidate = plan.contexts.front().candidates.front();
  const ModelGeometry rank = PerDeviceGeometry(one);
  const std::vector<LayerGroup> groups = GroupLayers(rank);
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<KvSizer> sizer,
                          MakeKvSizer(one.engine, rank, groups, candidate.asked));
  const KvLoad load{context, one.workload.concurrency, one.workload.shared_prefix_tokens};

  std::string text =
      absl::StrCat(plan.model_name, ", ", plan.engine_name, ", ", candidate.asked.Name(), ", ", context,
                   " tokens x ", load.sequences, load.sequences == 1 ? " sequence" : " sequences",
                   one.device.count > 1 ? absl::StrCat(", one of ", one.device.count, " devices") : "", "\n");
  for (const std::string& rewrite : sizer->rewrites()) absl::StrAppend(&text, "rewritten: ", rewrite, "\n");
  for (const std::string& line : sizer->Explain(load)) absl::StrAppend(&text, line, "\n");
  absl::StrAppendFormat(
      &text, "cache: %d B = %s MiB, %.3f bits per live value, %.2fx smaller than f16/f16\n\n",
      candidate.kv_bytes, FormatMiB(candidate.kv_bytes), candidate.bits_per_value, candidate.ratio_to_f16);
  for (const Item& item : candidate.items) {
    absl::StrAppendFormat(&text, "%-28s %16d B %12s MiB  %s\n", ItemKindLabel(item.kind), item.bytes,
                          FormatMiB(item.bytes), ProvenanceName(item.provenance));
  }
  absl::StrAppendFormat(&text, "%-28s %16d B %12s MiB\n", "sum", candidate.total_bytes,
                        FormatMiB(candidate.total_bytes));
  absl::StrAppendFormat(&text, "%-28s %16d B %12s MiB  %d - %d - %d (driver, in use)\n", "device",
                        plan.device_budget_bytes, FormatMiB(plan.device_budget_bytes), one.device.vram_bytes,
                        one.device.driver_reserve_bytes, one.device.in_use_bytes);
  absl::StrAppendFormat(&text, "%-28s %16d B %12s MiB  %s\n", "left", candidate.free_bytes,
                        FormatMiB(candidate.free_bytes), candidate.fits ? "fits" : "does not fit");
  if (candidate.speed.known) {
    absl::StrAppendFormat(&text, "decode: %.2f ms per step, %.1f tok/s (%.0f to %.0f)\n",
                          candidate.speed.step_ms, candidate.speed.tokens_per_s,
                          candidate.speed.tokens_per_s_low, candidate.speed.tokens_per_s_high);
  }
  absl::StrAppend(&text, "kernel: ", SupportLevelName(candidate.support.level),
                  candidate.support.reason.empty() ? "" : " - " + candidate.support.reason, "\n");
  return text;
}

}  // namespace kvtide::planner
