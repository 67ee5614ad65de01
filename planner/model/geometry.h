// The shape of a model as a list of layers, each with its own kind, heads and widths: everything that the
// size of its KV cache depends on. Nothing here multiplies "layers x heads x head_dim": a layer that slides,
// shares its cache with another or keeps a recurrent state is its own entry.
// Plain values, no I/O; readers (config_json.h, gguf.h, catalogue.h) make it, the arithmetic consumes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace kvtide::planner {

enum class LayerKind {
  kFull,       // attends over every token
  kSliding,    // attends over the last `window` tokens
  kChunked,    // attends within chunks of `window` tokens
  kMla,        // one latent vector per token (head_dim_k wide), no V; with `compress`, per several tokens
  kRecurrent,  // a fixed state of state_bytes per sequence
  kShared,     // reads the cache of layer `shared_with`, owns none
  kNone,       // no attention and no state (pure MLP layers)
};

const char* LayerKindName(LayerKind kind);

struct LayerGeometry {
  LayerKind kind = LayerKind::kFull;
  int n_kv_heads = 0;
  int head_dim_k = 0;
  int head_dim_v = 0;       // 0 for kMla
  int window = 0;           // kSliding, kChunked, and kMla with `compress`, in tokens
  int shared_with = -1;     // kShared: an earlier layer that owns a cache
  int64_t state_bytes = 0;  // kRecurrent (and beside kMla with `compress`), per sequence, all of it in f32
  int64_t conv_bytes = 0;   // of state_bytes: inputs of convolutions, which some engines keep in 16 bits
  int index_dim = 0;        // width of the key that a sparse-attention indexer keeps per token; 0 = none
  // kMla: the window keeps latents of single tokens; behind it one latent (and indexer key) stands for
  // `compress` tokens. 0 = every token has its own; 1 = nothing is kept behind the window.
  int compress = 0;

  bool OwnsCache() const {
    return kind == LayerKind::kFull || kind == LayerKind::kSliding || kind == LayerKind::kChunked ||
           kind == LayerKind::kMla;
  }
  friend bool operator==(const LayerGeometry&, const LayerGeometry&) = default;
};

enum class Answer { kUnknown, kNo, kYes };

// How keys are made (key_traits.h).
struct KeyTraits {
  Answer norm = Answer::kUnknown;  // an RMS norm behind the projection
  Answer bias = Answer::kUnknown;  // of the projection
};

struct ModelGeometry {
  std::string name;
  std::string source;      // where the numbers were read
  std::string confidence;  // catalogue entries: "high", "medium: ...", "low: ..."
  std::vector<LayerGeometry> layers;
  int64_t max_context = 0;  // 0 = unknown
  // 0 = unknown; only estimates of compute buffers and speed use these.
  int64_t n_embd = 0;
  int64_t n_vocab = 0;
  int n_query_heads = 0;
  int64_t params_total = 0;
  int64_t params_active = 0;  // 0 = dense
  int n_experts = 0;
  int n_experts_used = 0;
  // Values between the halves of one feed-forward layer for one token: intermediate_size; of a mixture the
  // width of one expert times the experts that a token visits, shared ones included. 0 = unknown.
  int64_t n_ff = 0;
  int64_t params_experts = 0;    // of params_total: routed experts of all layers; 0 = dense or unknown
  int64_t params_embedding = 0;  // of params_total: token embedding and, when it is not the same, the head
  KeyTraits key_traits;
  int mtp_layers = 0;                    // next-token prediction layers, which are not among `layers`
  std::vector<std::string> assumptions;  // everything that a reader filled in without being told
  // Parts of the cache that the model is known to have and that `layers` cannot say: a plan then calls its
  // bytes a lower bound, never exact.
  std::vector<std::string> uncounted;
};

// Layers with the same KV heads, head dims and attention window share pools and block tables. What a layer
// keeps beside its cache is a group of its own: keys of a sparse-attention indexer (one head, no values),
// latents that stand for several tokens, the state of what compresses them.
struct LayerGroup {
  LayerKind kind = LayerKind::kFull;
  int n_kv_heads = 0;
  int head_dim_k = 0;
  int head_dim_v = 0;
  int window = 0;  // 0 = full attention
  int64_t state_bytes = 0;
  int64_t conv_bytes = 0;
  bool index_keys = false;  // kind kMla, head_dim_k wide
  int compress = 1;         // tokens per entry of the cache
  std::vector<int> layers;  // indices into ModelGeometry::layers, ascending
};

// Names the first layer and field that make no sense (also sharing that is cyclic or points forward).
absl::Status ValidateGeometry(const ModelGeometry& model);

// Groups of the layers that own a cache or a state, in order of their first layer; then what they keep beside
// it.
std::vector<LayerGroup> GroupLayers(const ModelGeometry& model);

// What one GPU of `ranks` holds under tensor parallelism: KV heads are divided (rounded up, never below one),
// an MLA latent and the keys of an indexer are replicated, recurrent state is divided.
ModelGeometry ShardHeads(const ModelGeometry& model, int ranks);

// The contiguous slice of layers of the fullest GPU when `ranks` GPUs split the layers evenly. Shared layers
// whose owner lies in another slice are dropped with it.
ModelGeometry FullestLayerSlice(const ModelGeometry& model, int ranks);

// A layer of DeepSeek V4: a window of single latents; behind it one latent per `compress` tokens, 4 with an
// indexer or 128 (1 = none). What compresses keeps two f32 tensors, of 8 x 2 widths or of 128 (as llama.cpp
// has them).
LayerGeometry CompressedLatent(int width, int window, int compress, int index_dim);

// Query heads per KV head of the first layer that owns a cache; 0 when unknown.
int GroupedQueryRatio(const ModelGeometry& model);

}  // namespace kvtide::planner
