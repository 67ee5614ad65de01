#include "planner/plan/plan_request.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "planner/engines/llama_cpp.h"
#include "planner/plan/hardware.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

constexpr int kMaxDevices = 1024;
constexpr int64_t kMaxBytes = 1'000'000'000'000'000'000;
constexpr int kMaxRecurrentCopies = 64;
constexpr int kMaxTokensPerStep = 1 << 24;
constexpr int kVllmBlockUnit = 16;

// Tensor parallelism gives every GPU the same number of query heads, and of KV heads either a share or one
// copy.
absl::Status CheckTensorParallel(const PlanRequest& request) {
  const int count = request.device.count, heads = request.model.n_query_heads;
  if (SplitsLayers(request) || request.engine.dp_attention || count == 1 || heads == 0 || heads % count == 0)
    return absl::OkStatus();
  int fewer = count, more = count;
  while (fewer > 1 && heads % fewer != 0) --fewer;
  while (more < heads && heads % more != 0) ++more;
  return absl::InvalidArgumentError(
      absl::StrCat("device: ", EngineName(request.engine.engine), " refuses ", count, " GPUs: ", heads,
                   " query heads do not divide by ", count, "; use ", fewer,
                   more <= heads && heads % more == 0 ? absl::StrCat(" or ", more) : "",
                   request.engine.engine == Engine::kLlamaCpp ? ", or split layers" : ""));
}

// One field that is out of range, in the words of its flag.
absl::Status OutOf(const char* field, double value, const char* expected) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", value, "; expected ", expected));
}

absl::Status CheckShares(const EngineOptions& engine) {
  const char* share = "a share above 0 and at most 1";
  if (!(engine.gpu_memory_utilization > 0) || engine.gpu_memory_utilization > 1)
    return OutOf("gpu memory utilization", engine.gpu_memory_utilization, share);
  if (!(engine.mem_fraction_static >= 0) || engine.mem_fraction_static > 1)
    return OutOf("mem fraction static", engine.mem_fraction_static, share);
  if (!(engine.swa_full_tokens_ratio > 0) || engine.swa_full_tokens_ratio > 1)
    return OutOf("swa full tokens ratio", engine.swa_full_tokens_ratio, share);
  return absl::OkStatus();
}

absl::Status CheckSteps(const EngineOptions& engine) {
  const auto tokens = [](int value) { return value >= 1 && value <= kMaxTokensPerStep; };
  const char* step = "1 to 2^24 tokens";
  if (!tokens(engine.ubatch)) return OutOf("ubatch", engine.ubatch, step);
  if (!tokens(engine.max_batched_tokens)) return OutOf("max batched tokens", engine.max_batched_tokens, step);
  if (!tokens(engine.block_tokens)) return OutOf("block size", engine.block_tokens, step);
  if (engine.engine == Engine::kVllm && engine.block_tokens % kVllmBlockUnit != 0)
    return OutOf("block size", engine.block_tokens, "a multiple of 16, as vLLM's attention kernels need");
  if (engine.page_tokens < 1 || engine.page_tokens > kMaxPlannedContext)
    return OutOf("page size", engine.page_tokens, "1 token or more");
  if (engine.chunked_prefill < 0) return OutOf("chunked prefill size", engine.chunked_prefill, "0 or more");
  if (engine.max_total_tokens < 0)
    return OutOf("max total tokens", static_cast<double>(engine.max_total_tokens), "0 (no limit) or more");
  if (engine.exact_window.first_blocks < 0 || engine.exact_window.last_blocks < 0)
    return absl::InvalidArgumentError("exact window: expected 0 blocks or more on either side");
  return absl::OkStatus();
}

}  // namespace

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
  if (request.device.count < 1 || request.device.count > kMaxDevices)
    return absl::InvalidArgumentError(absl::StrCat("device: count must be 1 to ", kMaxDevices));
  KVTIDE_RETURN_IF_ERROR(CheckHardware(request));
  KVTIDE_RETURN_IF_ERROR(CheckTensorParallel(request));
  if (request.device.UsableBytes() <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("device: nothing of its ", FormatBytes(request.device.vram_bytes), " is free"));
  }
  for (const int64_t bytes :
       {request.weights.bytes, work.mmproj_bytes, work.draft_bytes,
        work.draft.has_value() ? work.draft->weights.bytes : 0, request.device.vram_bytes,
        request.device.host_bytes, std::max<int64_t>(request.margin_bytes, 0)}) {
    if (bytes < 0 || bytes > kMaxBytes)
      return absl::InvalidArgumentError(
          "sizes: weights, projectors, drafts, devices and margins are 0 to 10^18 bytes");
  }
  if (work.draft.has_value()) KVTIDE_RETURN_IF_ERROR(Annotate(ValidateGeometry(work.draft->model), "draft"));
  if (work.mtp_layers < 0 || work.mtp_layers > 64)
    return absl::InvalidArgumentError("mtp layers: expected 0 to 64");
  if (work.mtp_layers > 0 && MtpGeometry(request.model, 1).layers.empty())
    return absl::InvalidArgumentError(
        "mtp layers: the model has no layer with full attention that they could be like");
  const EngineOptions& engine = request.engine;
  if (engine.engine == Engine::kLlamaCpp) KVTIDE_RETURN_IF_ERROR(CheckLlamaBuild(engine.build));
  if (engine.dp_attention && !QueuesSequences(engine.engine))
    return absl::InvalidArgumentError("dp attention: only servers such as vllm have it");
  if (engine.recurrent_copies < 0 || engine.recurrent_copies > kMaxRecurrentCopies)
    return absl::InvalidArgumentError(absl::StrCat("recurrent copies: expected 0 to ", kMaxRecurrentCopies));
  if (engine.total_context && work.shared_prefix_tokens > 0)
    return absl::InvalidArgumentError("shared prefix: -c is the cells of all slots, whatever they share");
  if (engine.calibrated_keys.has_value() && engine.engine != Engine::kKvtide)
    return absl::InvalidArgumentError(
        absl::StrCat("profile: ", EngineName(engine.engine), " codes no keys by a profile; kvtide does"));
  KVTIDE_RETURN_IF_ERROR(CheckShares(engine));
  return CheckSteps(engine);
}

}  // namespace kvtide::planner
