// Device memory besides weights and cache: compute buffers, scratch, contexts, graphs. Every item says how
// well it is known; the constants and where they come from stand in overheads.cc.
#pragma once

#include "planner/engines/kv_sizer.h"
#include "planner/engines/sglang.h"
#include "planner/item.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

// CUDA context and cuBLAS of one process: 330 MiB measured by users of llama.cpp on consumer cards (2026).
constexpr int64_t kCudaContextBytes = int64_t{320} << 20;

// Items per device for one pair and load; not weights, cache, projector, draft or margin.
ItemList OverheadItems(const PlanRequest& request, const KvLoad& load, const KvSizer& sizer);

// The compute buffers of a second context, of a draft model or of next-token prediction layers.
Item DraftComputeItem(const PlanRequest& request, const ModelGeometry& draft, const KvLoad& load);

// What SGLang decides for this model on this device when nobody tells it.
SglangDefaults SglangDefaultsOf(const PlanRequest& request);

// What is kept free per device: the asked margin, the default, or what vLLM leaves by gpu_memory_utilization.
int64_t MarginBytes(const PlanRequest& request);

}  // namespace kvtide::planner
