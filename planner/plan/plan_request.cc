#include "planner/plan/plan_request.h"

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::planner {

absl::Status CheckPlanRequest(const PlanRequest& request) {
  KVTIDE_RETURN_IF_ERROR(Annotate(ValidateGeometry(request.model), "model"));
  const Workload& work = request.workload;
  if (work.contexts.empty()) return absl::InvalidArgumentError("context: give at least one context length");
  for (int64_t context : work.contexts) {
    if (context < 1 || context > kMaxPlannedContext) {
      return absl::InvalidArgumentError(
          absl::StrCat("context: ", context, " tokens; expected 1 to ", kMaxPlannedContext));
    }
    if (work.shared_prefix_tokens < 0 || work.shared_prefix_tokens >= context) {
      return absl::InvalidArgumentError(absl::StrCat("shared prefix: ", work.shared_prefix_tokens,
                                                     " tokens; expected 0 to less than the context ",
                                                     context));
    }
  }
  if (work.concurrency < 1 || work.concurrency > kMaxPlannedConcurrency) {
    return absl::InvalidArgumentError(
        absl::StrCat("concurrency: ", work.concurrency, "; expected 1 to ", kMaxPlannedConcurrency));
  }
  if (request.device.count < 1) return absl::InvalidArgumentError("device: count must be 1 or more");
  if (request.device.UsableBytes() <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("device: nothing of its ", FormatBytes(request.device.vram_bytes), " is free"));
  }
  if (request.weights.bytes < 0 || work.mmproj_bytes < 0 || work.draft_bytes < 0) {
    return absl::InvalidArgumentError("weights: sizes must not be negative");
  }
  const EngineOptions& engine = request.engine;
  if (engine.ubatch < 1 || engine.block_tokens < 1 || engine.max_batched_tokens < 1 ||
      engine.exact_window.first_blocks < 0 || engine.exact_window.last_blocks < 0 ||
      engine.gpu_memory_utilization <= 0 || engine.gpu_memory_utilization > 1) {
    return absl::InvalidArgumentError(
        "engine: ubatch, block size and batched tokens must be 1 or more, exact windows 0 or more, "
        "gpu memory utilization above 0 and at most 1");
  }
  return absl::OkStatus();
}

}  // namespace kvtide::planner
