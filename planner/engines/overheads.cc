#include "planner/engines/overheads.h"

#include <algorithm>

#include "planner/units.h"

namespace kvtide::planner {
namespace {

// CUDA context and cuBLAS of one process: 330 MiB measured by users of llama.cpp on consumer cards (2026).
constexpr int64_t kCudaContextBytes = 320 * kMiB;
constexpr int64_t kDefaultEmbd = 4096;     // when the width of the model is unknown
constexpr int64_t kDefaultVocab = 131072;  // when the vocabulary is unknown

struct Width {
  int64_t embd;
  int64_t vocab;
  bool known;
};

Width WidthOf(const ModelGeometry& model) {
  const bool known = model.n_embd > 0 && model.n_vocab > 0;
  return {model.n_embd > 0 ? model.n_embd : kDefaultEmbd, model.n_vocab > 0 ? model.n_vocab : kDefaultVocab,
          known};
}

bool HasLatent(const ModelGeometry& model) {
  return std::any_of(model.layers.begin(), model.layers.end(),
                     [](const LayerGeometry& layer) { return layer.kind == LayerKind::kMla; });
}

// llama.cpp: activations and logits of the reserved graph, attention mask, and a term per token of context
// that quantised caches and latents add. Fitted to start-up logs of 2026 builds.
int64_t LlamaCppCompute(const PlanRequest& request, const KvLoad& load, const KvSizer& sizer) {
  const Width width = WidthOf(request.model);
  const int64_t ubatch = request.engine.ubatch;
  const double base =
      1.15 * static_cast<double>(4 * width.embd * ubatch * 4 +
                                 width.vocab * ubatch * 4 * (load.sequences > 1 ? load.sequences - 1 : 0));
  const int64_t tokens = load.context * (request.engine.unified ? load.sequences : 1);
  const int64_t copies = request.device.count > 1 ? 4 : 1;  // pipeline copies of the mask
  double per_token = 1.5 * static_cast<double>(ubatch * 2 * copies);
  const bool half = sizer.effective().k == "f16" || sizer.effective().k == "bf16";
  if (!half) per_token += 2.25 * static_cast<double>(width.embd);
  if (HasLatent(request.model)) per_token += 1.25 * static_cast<double>(width.embd);
  double bytes = base + per_token * static_cast<double>(tokens);
  if (!request.engine.flash_attention) {  // scores of all query heads
    bytes += static_cast<double>(std::max(1, request.model.n_query_heads)) *
             static_cast<double>(ubatch * tokens * 4);
  }
  return static_cast<int64_t>(bytes);
}

// vLLM: the largest activations of a profiling run: about 8 widths of f16 per token, and f32 logits per
// sequence.
int64_t VllmActivations(const PlanRequest& request) {
  const Width width = WidthOf(request.model);
  const int64_t per_token = 8 * width.embd * 2 * 2;
  return request.engine.max_batched_tokens * per_token + 256 * width.vocab * 4;
}

}  // namespace

ItemList OverheadItems(const PlanRequest& request, const KvLoad& load, const KvSizer& sizer) {
  ItemList items;
  if (request.cache_tier_only) return items;
  const bool known = WidthOf(request.model).known;
  switch (request.engine.engine) {
    case Engine::kLlamaCpp:
      items.push_back({ItemKind::kCompute, LlamaCppCompute(request, load, sizer),
                       known ? Provenance::kCalibrated : Provenance::kGuess});
      items.push_back({ItemKind::kDequantScratch, sizer.ScratchBytes(load), Provenance::kFormula});
      items.push_back({ItemKind::kContext, kCudaContextBytes, Provenance::kCalibrated});
      break;
    case Engine::kVllm:
      items.push_back({ItemKind::kCompute, VllmActivations(request), Provenance::kGuess});
      items.push_back({ItemKind::kContext, kCudaContextBytes + (request.device.count > 1 ? 342 * kMiB : 0),
                       Provenance::kGuess});
      if (request.engine.cuda_graphs) items.push_back({ItemKind::kGraphs, 768 * kMiB, Provenance::kGuess});
      break;
    case Engine::kKvtide:
      items.push_back({ItemKind::kCompute, VllmActivations(request), Provenance::kGuess});
      items.push_back({ItemKind::kDequantScratch, sizer.ScratchBytes(load), Provenance::kFormula});
      // Two processes on the card: the engine and the daemon.
      items.push_back({ItemKind::kContext, 2 * kCudaContextBytes, Provenance::kCalibrated});
      break;
  }
  return items;
}

int64_t DefaultMarginBytes(int64_t device_bytes) {
  return std::max<int64_t>(512 * kMiB, device_bytes / 100 * 3);
}

int64_t MarginBytes(const PlanRequest& request) {
  if (request.engine.engine == Engine::kVllm && request.margin_bytes < 0) {
    return static_cast<int64_t>(static_cast<double>(request.device.vram_bytes) *
                                (1 - request.engine.gpu_memory_utilization));
  }
  return request.margin_bytes >= 0 ? request.margin_bytes : DefaultMarginBytes(request.device.vram_bytes);
}

}  // namespace kvtide::planner
