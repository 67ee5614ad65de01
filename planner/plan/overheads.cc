#include "planner/plan/overheads.h"

#include <algorithm>

#include "planner/engines/kvtide_engine.h"
#include "planner/engines/llama_cpp.h"
#include "planner/engines/sglang.h"
#include "planner/saturating.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kSglangReserve = 100 * kMiB;  // its multimodal reservation, which every start keeps
constexpr int64_t kDefaultEmbd = 4096;          // when the width of the model is unknown
constexpr int64_t kDefaultVocab = 131072;       // when the vocabulary is unknown

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

// Known to the byte for dense models whose shape is known (tests hold start-up logs against it); experts,
// recurrent layers and latents add tensors that were fitted to few logs.
Provenance ComputeProvenance(const ModelGeometry& model) {
  if (!WidthOf(model).known) return Provenance::kGuess;
  const bool plain = model.n_experts == 0 && model.n_ff > 0 &&
                     std::all_of(model.layers.begin(), model.layers.end(), [](const LayerGeometry& layer) {
                       return layer.kind == LayerKind::kFull || layer.kind == LayerKind::kSliding;
                     });
  return plain ? Provenance::kFormula : Provenance::kCalibrated;
}

// vLLM: the largest activations of a profiling run: about 8 widths of f16 per token, and f32 logits per
// sequence.
int64_t VllmActivations(const PlanRequest& request) {
  const Width width = WidthOf(request.model);
  const int64_t per_token = Product(8, width.embd, 2, 2);
  return Sum(Product(request.engine.max_batched_tokens, per_token), Product(256, width.vocab, 4));
}

}  // namespace

ItemList OverheadItems(const PlanRequest& request, const KvLoad& load, const KvSizer& sizer) {
  ItemList items;
  if (request.cache_tier_only) return items;
  switch (request.engine.engine) {
    case Engine::kLlamaCpp:
      items.push_back({ItemKind::kCompute,
                       LlamaCppComputeBytes(request.model, request.engine, request.device.count, load),
                       ComputeProvenance(request.model)});
      if (request.device.memory == DeviceMemory::kHost) break;  // the CPU reads coded caches as they are
      items.push_back({ItemKind::kDequantScratch, sizer.ScratchBytes(load), Provenance::kFormula});
      if (request.engine.backend == LlamaBackend::kCuda)
        items.push_back({ItemKind::kContext, kCudaContextBytes, Provenance::kCalibrated});
      break;
    case Engine::kVllm:
      items.push_back({ItemKind::kCompute, VllmActivations(request), Provenance::kGuess});
      items.push_back({ItemKind::kContext, kCudaContextBytes + (request.device.count > 1 ? 342 * kMiB : 0),
                       Provenance::kGuess});
      if (request.engine.cuda_graphs) items.push_back({ItemKind::kGraphs, 768 * kMiB, Provenance::kGuess});
      break;
    case Engine::kSglang:
      // Activations and graphs live in what --mem-fraction-static leaves free (MarginBytes).
      items.push_back({ItemKind::kContext,
                       kCudaContextBytes + kSglangReserve + (request.device.count > 1 ? 342 * kMiB : 0),
                       Provenance::kGuess});
      break;
    case Engine::kKvtide:
      items.push_back({ItemKind::kCompute, VllmActivations(request), Provenance::kGuess});
      items.push_back({ItemKind::kDequantScratch, sizer.ScratchBytes(load), Provenance::kFormula});
      if (request.device.memory != DeviceMemory::kHost)
        items.push_back({ItemKind::kPlanTables, kKvtidePlanBytes, Provenance::kFormula});
      items.push_back({ItemKind::kKeyProfile, sizer.KeyProfileBytes(), Provenance::kFormula});
      // Two processes on the card: the engine and the daemon.
      items.push_back({ItemKind::kContext, 2 * kCudaContextBytes, Provenance::kCalibrated});
      break;
  }
  return items;
}

Item DraftComputeItem(const PlanRequest& request, const ModelGeometry& draft, const KvLoad& load) {
  if (request.engine.engine != Engine::kLlamaCpp) return {ItemKind::kDraftCompute, 0, Provenance::kFormula};
  return {ItemKind::kDraftCompute, LlamaCppComputeBytes(draft, request.engine, 1, load),
          ComputeProvenance(draft)};
}

int64_t DefaultMarginBytes(int64_t device_bytes) {
  return std::max<int64_t>(512 * kMiB, device_bytes / 100 * 3);
}

SglangDefaults SglangDefaultsOf(const PlanRequest& request) {
  const bool latent = std::any_of(request.model.layers.begin(), request.model.layers.end(),
                                  [](const LayerGeometry& layer) { return layer.kind == LayerKind::kMla; });
  return DefaultsOfSglang(request.engine, request.device.vram_bytes - request.device.driver_reserve_bytes,
                          request.device.count, latent);
}

int64_t MarginBytes(const PlanRequest& request) {
  if (request.engine.engine == Engine::kVllm && request.margin_bytes < 0) {
    return static_cast<int64_t>(static_cast<double>(request.device.vram_bytes) *
                                (1 - request.engine.gpu_memory_utilization));
  }
  if (request.engine.engine == Engine::kSglang && request.margin_bytes < 0) {
    const int64_t device = request.device.vram_bytes - request.device.driver_reserve_bytes;
    const double fraction = SglangDefaultsOf(request).mem_fraction_static;
    return static_cast<int64_t>(static_cast<double>(device) * (1 - fraction));
  }
  return request.margin_bytes >= 0 ? request.margin_bytes : DefaultMarginBytes(request.device.vram_bytes);
}

}  // namespace kvtide::planner
