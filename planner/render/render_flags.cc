#include "planner/render/render_flags.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status.h"
#include "planner/engines/compressed_latents.h"
#include "planner/engines/sglang.h"
#include "planner/engines/vllm.h"
#include "planner/plan/overheads.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

absl::StatusOr<const ContextPlan*> LargestContext(const PlanRequest& request, const Plan& plan,
                                                  Engine engine) {
  if (request.engine.engine != engine) {
    return absl::InvalidArgumentError(absl::StrCat("this output needs --engine ", EngineName(engine),
                                                   ", the plan is for ", EngineName(request.engine.engine)));
  }
  const ContextPlan* largest = nullptr;
  for (const ContextPlan& context : plan.contexts) {
    if (largest == nullptr || context.context > largest->context) largest = &context;
  }
  if (largest == nullptr || largest->verdict == Verdict::kDoesNotFit) {
    return absl::FailedPreconditionError(
        absl::StrCat("no settings: ", largest == nullptr ? "no context" : largest->reason));
  }
  return largest;
}

const TypePair& PairOf(const ContextPlan& context) {
  return context.chosen >= 0 ? context.candidates[context.chosen].asked : context.split->pair;
}

// What was asked, unless the engine takes its own for the model.
int BlockTokens(const PlanRequest& request, int asked) {
  return HasCompressedLatents(GroupLayers(request.model)) ? kCompressedLatentBlock : asked;
}

}  // namespace

absl::StatusOr<std::string> RenderLlamaArgs(const PlanRequest& request, const Plan& plan) {
  KVTIDE_ASSIGN_OR_RETURN(const ContextPlan* context, LargestContext(request, plan, Engine::kLlamaCpp));
  const Workload& work = request.workload;
  const TypePair& pair = PairOf(*context);
  const int64_t tokens =
      request.engine.total_context
          ? context->context
          : Sum(Product(work.shared_prefix_tokens, request.engine.unified ? 1 : work.concurrency),
                Product(work.concurrency, context->context - work.shared_prefix_tokens));
  int layers = 999;
  int cpu_experts = 0;
  bool kv_on_host = false;
  if (context->split.has_value() && context->chosen < 0) {
    kv_on_host = context->split->device_kv_bytes == 0;
    cpu_experts = context->split->cpu_expert_layers;
    if (!kv_on_host && cpu_experts == 0) layers = context->split->device_layers;
  }
  std::string args =
      absl::StrCat("-c ", tokens, " -np ", work.concurrency, " -ngl ", layers, " -ctk ", pair.k);
  if (pair.v != "none") absl::StrAppend(&args, " -ctv ", pair.v);
  absl::StrAppend(&args, " -fa ", request.engine.flash_attention ? "on" : "off", " -ub ",
                  request.engine.ubatch);
  if (request.engine.unified && work.concurrency > 1) absl::StrAppend(&args, " -kvu");
  if (request.engine.swa_full) absl::StrAppend(&args, " --swa-full");
  if (kv_on_host) absl::StrAppend(&args, " --no-kv-offload");
  if (cpu_experts > 0) absl::StrAppend(&args, " --n-cpu-moe ", cpu_experts);
  if (request.device.count > 1)
    absl::StrAppend(&args, " -sm ", request.engine.split_tensors ? "tensor" : "layer");
  return args + " -fit off\n";
}

absl::StatusOr<std::string> RenderVllmArgs(const PlanRequest& request, const Plan& plan) {
  KVTIDE_ASSIGN_OR_RETURN(const ContextPlan* context, LargestContext(request, plan, Engine::kVllm));
  const Candidate& chosen = context->candidates[context->chosen];
  std::string args = absl::StrCat(
      "--max-model-len ", context->context, " --max-num-seqs ", request.workload.concurrency,
      " --max-num-batched-tokens ", request.engine.max_batched_tokens, " --block-size ",
      BlockTokens(request, request.engine.block_tokens), " --kv-cache-dtype ", VllmCacheDtype(chosen.asked),
      request.engine.dp_attention ? " --enable-expert-parallel --data-parallel-size "
                                  : " --tensor-parallel-size ",
      request.device.count);
  absl::StrAppendFormat(&args, " --gpu-memory-utilization %.2f", request.engine.gpu_memory_utilization);
  if (!request.engine.cuda_graphs) absl::StrAppend(&args, " --enforce-eager");
  return args + "\n";
}

absl::StatusOr<std::string> RenderSglangArgs(const PlanRequest& request, const Plan& plan) {
  KVTIDE_ASSIGN_OR_RETURN(const ContextPlan* context, LargestContext(request, plan, Engine::kSglang));
  const Candidate& chosen = context->candidates[context->chosen];
  const EngineOptions& engine = request.engine;
  const SglangDefaults defaults = SglangDefaultsOf(request);
  std::string args = absl::StrCat(
      "--context-length ", context->context, " --max-running-requests ", request.workload.concurrency,
      " --kv-cache-dtype ", SglangCacheDtype(chosen.asked), " --tp-size ", request.device.count,
      engine.dp_attention ? absl::StrCat(" --dp-size ", request.device.count, " --enable-dp-attention") : "",
      " --page-size ", BlockTokens(request, engine.page_tokens), " --chunked-prefill-size ",
      defaults.chunked_prefill);
  absl::StrAppendFormat(&args, " --mem-fraction-static %.3f", defaults.mem_fraction_static);
  if (engine.max_total_tokens > 0) absl::StrAppend(&args, " --max-total-tokens ", engine.max_total_tokens);
  const bool windows = std::any_of(request.model.layers.begin(), request.model.layers.end(),
                                   [](const LayerGeometry& layer) { return layer.window > 0; });
  if (windows && !engine.swa_full)
    absl::StrAppendFormat(&args, " --swa-full-tokens-ratio %g", engine.swa_full_tokens_ratio);
  if (engine.cuda_graphs) {
    absl::StrAppend(&args, " --cuda-graph-max-bs ",
                    std::min(defaults.graph_batch, std::max(1, request.workload.concurrency)));
  } else {
    absl::StrAppend(&args, " --disable-cuda-graph");
  }
  return args + "\n";
}

absl::StatusOr<std::string> RenderKvtidedConfig(const PlanRequest& request, const Plan& plan) {
  KVTIDE_ASSIGN_OR_RETURN(const ContextPlan* context, LargestContext(request, plan, Engine::kKvtide));
  const TypePair& pair = PairOf(*context);
  const auto chosen = std::find_if(context->candidates.begin(), context->candidates.end(),
                                   [&](const Candidate& candidate) { return candidate.asked == pair; });
  if (chosen->harm.calibrated) {
    return absl::InvalidArgumentError(absl::StrCat(
        "keys of ", pair.Name(),
        " are coded by a profile, which a model brings when it is registered (Layer.key_mean), not the "
        "daemon; plan without --profile for its default pair"));
  }
  const int64_t device_bytes = context->chosen >= 0 ? context->candidates[context->chosen].kv_bytes +
                                                          context->candidates[context->chosen].free_bytes
                                                    : context->split->device_kv_bytes;
  nlohmann::ordered_json config;
  config["device_tier_bytes"] = device_bytes / kMiB * kMiB;
  if (const int64_t host_bytes = request.device.host_bytes / kMiB * kMiB; host_bytes > 0) {
    config["host_tier_bytes"] = host_bytes;
  } else {
    config["host_memory"] = "0";  // no bytes would be the default
  }
  config["default_pair"] = pair.Name();
  config["exact_window"] = {{"first_blocks", request.engine.exact_window.first_blocks},
                            {"last_blocks", request.engine.exact_window.last_blocks}};
  return config.dump(2) + "\n";
}

}  // namespace kvtide::planner
