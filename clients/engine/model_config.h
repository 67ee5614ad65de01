// What the engine needs to know of a model, read from the config.json of a Hugging Face folder (a GGUF file:
// model_files.h): the shape of the cache as the planner reads it, and what only who computes has to know. The
// reader accepts Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3 and Phi-3, and refuses by name every setting
// that would change the result and that the engine does not compute: a wrong answer would look like a bad
// cache.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace kvtide::engine {

enum class RopeScaling { kNone, kLinear, kLlama3, kYarn };
enum class Activation { kSilu, kGeluTanh };

struct ModelConfig {
  std::string architecture;
  int hidden_size = 0;
  int intermediate_size = 0;
  int layers = 0;
  int query_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  int max_positions = 0;
  int sliding_window = 0;  // 0 = every layer attends over all tokens
  float rms_norm_eps = 1e-6f;
  bool tied_embeddings = false;
  bool qkv_bias = false;        // Qwen2
  bool output_bias = false;     // Llama with attention_bias
  bool query_key_norm = false;  // Qwen3: RMSNorm of each head's q and k before the rotation

  Activation activation = Activation::kSilu;
  float embedding_scale = 1;                       // Gemma: embeddings are multiplied by it
  bool norm_plus_one = false;                      // Gemma's folders: norms are stored less one
  bool sandwich_norms = false;                     // Gemma: norms behind attention and feed-forward too
  bool fused_projections = false;                  // Phi-3: q, k and v in one matrix, gate and up in another
  float attention_scale = 0;                       // 0 = 1/sqrt(head_dim)
  float attention_softcap = 0, final_softcap = 0;  // 0 = none
  std::vector<int> layer_windows;                  // of each layer, 0 = all tokens; empty = sliding_window

  double rope_theta = 10000;
  double local_rope_theta = 0;        // of layers with a window, unscaled; 0 = as the others
  std::vector<double> rope_divisors;  // of each frequency (GGUF); empty = none
  RopeScaling rope_scaling = RopeScaling::kNone;
  double rope_factor = 1;
  double rope_low_frequency = 1;
  double rope_high_frequency = 4;
  double rope_original_positions = 0;
  double yarn_beta_fast = 32, yarn_beta_slow = 1;
  double rope_attention_factor = 1;  // of cos and sin (YaRN)

  int32_t bos_token = -1;           // -1 = none
  std::vector<int32_t> eos_tokens;  // any of them ends a text

  int window(int layer) const {
    return layer_windows.empty() ? sliding_window : layer_windows[static_cast<size_t>(layer)];
  }
  // Query heads that share one KV head.
  int group() const { return query_heads / kv_heads; }
};

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json_text);

// Reads FOLDER/config.json.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& folder);

// One frequency per pair of channels, head_dim / 2 of them, after the scaling that the config asks for; of
// the layers with a window if `local`.
std::vector<double> RopeFrequencies(const ModelConfig& config, bool local = false);

}  // namespace kvtide::engine
