// The compute buffer of llama.cpp, as its graph allocator lays it out. Checked against 76 starts on the CPU
// (tests/golden/planner/llama_cpp_starts.tsv): three models, 1 to 4 slots, ubatch 64 to 2048, flash attention
// on and off, windowed and full-size caches of sliding layers.
#include <algorithm>

#include "planner/engines/llama_cpp.h"
#include "planner/saturating.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kDefaultEmbd = 4096;     // when the width of the model is unknown
constexpr int64_t kDefaultVocab = 131072;  // when the vocabulary is unknown
constexpr int64_t kValueBytes = 4;         // activations, scores and logits are f32
constexpr int64_t kMaskCopies = 4;         // inputs that pipelining over several GPUs keeps

int64_t Width(const ModelGeometry& model) { return model.n_embd > 0 ? model.n_embd : kDefaultEmbd; }

// Cells of all masks together: one of the layers with full attention, one of those with a window.
int64_t MaskCells(const ModelGeometry& model, const EngineOptions& options, const KvLoad& load) {
  int64_t full = 0, windowed = 0;
  for (const LayerGeometry& layer : model.layers) {
    if (!layer.OwnsCache()) continue;
    int64_t& cells = layer.window > 0 ? windowed : full;
    cells = std::max(cells, LlamaCppCells(options, layer.window, 1, load));
  }
  return Sum(full, windowed);
}

int64_t QueryWidth(const ModelGeometry& model) {
  int64_t widest = 0;
  for (const LayerGeometry& layer : model.layers) widest = std::max<int64_t>(widest, layer.head_dim_k);
  return Product(std::max(1, model.n_query_heads), widest);
}

}  // namespace

int64_t FeedForwardWidth(const ModelGeometry& model) {
  if (model.n_ff > 0) return model.n_ff;
  const int64_t width = Width(model), layers = static_cast<int64_t>(model.layers.size());
  const int64_t params = model.params_active > 0 ? model.params_active : model.params_total;
  if (params <= 0 || layers == 0) return 4 * width;
  // What is left of a layer without embedding, head and attention, in three matrices.
  const int64_t per_layer = (params - std::min(params / 2, Product(2, model.n_vocab, width))) / layers;
  const int64_t attention = 2 * width * QueryWidth(model) + 2 * width * width / 4;
  return std::clamp<int64_t>((per_layer - attention) / (3 * width), width, 8 * width);
}

int64_t LlamaCppComputeBytes(const ModelGeometry& model, const EngineOptions& options, int devices,
                             const KvLoad& load) {
  const int64_t width = Width(model), ubatch = options.ubatch;
  const int64_t vocab = model.n_vocab > 0 ? model.n_vocab : kDefaultVocab;
  const int64_t outputs = std::min<int64_t>(ubatch, load.sequences);
  const int64_t row = Product(ubatch, kValueBytes);
  // What lives through a layer is five rows of the model's width; beside it stand, at different times, the
  // three products of the feed-forward part, queries with scores, or the logits.
  const int64_t experts = model.n_experts > 0 ? Product(2, width, model.n_experts_used) : 0;
  const int64_t ff = FeedForwardWidth(model);
  const int64_t feed_forward = Product(row, std::max(Product(3, ff), Sum(ff, experts)));
  int64_t attention = Product(row, 3, QueryWidth(model));
  if (!options.flash_attention) {
    attention =
        Sum(attention, Product(row, std::max(1, model.n_query_heads), LlamaCppCells(options, 0, 1, load)));
  }
  const int64_t logits = Product(vocab, kValueBytes, outputs);
  const int64_t activations = Sum(Product(row, 5, width), std::max({feed_forward, attention, logits}));
  const int64_t mask = Product(MaskCells(model, options, load), ubatch, options.flash_attention ? 2 : 4,
                               devices > 1 ? kMaskCopies : 1);
  return Sum(activations, mask);
}

}  // namespace kvtide::planner
