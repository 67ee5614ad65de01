#include "planner/model/config_parameters.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/match.h"

namespace kvtide::planner {
namespace {

using Json = nlohmann::json;

constexpr double kMaxParameters = 1e17;

class Counter {
 public:
  Counter(const Json& config, const ModelGeometry& model)
      : config_(config), model_(model), hidden_(static_cast<double>(model.n_embd)) {
    type_ = config.contains("model_type") && config["model_type"].is_string()
                ? config["model_type"].get<std::string>()
                : "";
  }

  void Count(ModelGeometry* model) {
    double total = Embedding();
    const double embedding = total;
    double experts = 0;
    for (int i = 0; i < static_cast<int>(model_.layers.size()); ++i) {
      const double mixer = Mixer(i);
      const double routed = Experts(i);
      const double rest = FeedForward(i);
      if (mixer < 0 || routed < 0 || rest < 0) return;
      total += mixer + routed + rest;
      experts += routed;
    }
    if (total <= 0 || total > kMaxParameters || embedding <= 0) return;
    model->params_total = static_cast<int64_t>(total);
    model->params_embedding = static_cast<int64_t>(embedding);
    if (experts <= 0 || model_.n_experts_used <= 0 || model_.n_experts_used >= model_.n_experts) return;
    model->params_experts = static_cast<int64_t>(experts);
    const double idle = 1 - static_cast<double>(model_.n_experts_used) / model_.n_experts;
    model->params_active = static_cast<int64_t>(total - experts * idle);
  }

 private:
  double Number(const char* field, double fallback = 0) const {
    if (!config_.contains(field) || !config_[field].is_number()) return fallback;
    const double value = config_[field].get<double>();
    return value >= 0 && value < 1e9 ? value : fallback;
  }

  bool Is(const char* field, bool fallback = false) const {
    return config_.contains(field) && config_[field].is_boolean() ? config_[field].get<bool>() : fallback;
  }

  const Json* List(const char* field) const {
    return config_.contains(field) && config_[field].is_array() ? &config_[field] : nullptr;
  }

  // Entry `i` of a list of words or numbers, as text; "" when there is none.
  std::string Entry(const char* field, int i) const {
    const Json* list = List(field);
    if (list == nullptr || static_cast<size_t>(i) >= list->size()) return "";
    const Json& entry = (*list)[static_cast<size_t>(i)];
    return entry.is_string() ? entry.get<std::string>() : entry.dump();
  }

  double Embedding() const {
    const double table = static_cast<double>(model_.n_vocab) * hidden_;
    // Classes whose default is tied.
    const bool tied_by_default = absl::StartsWith(type_, "gemma") || absl::StartsWith(type_, "cohere");
    const double per_layer = Number("vocab_size_per_layer_input") * Number("hidden_size_per_layer_input") *
                             static_cast<double>(model_.layers.size());
    const bool tied = Is("tie_word_embeddings", tied_by_default) || Is("use_embedding_sharing");
    return table * (tied ? 1 : 2) + per_layer;
  }

  // Attention or what a layer has in its place. < 0: cannot be counted.
  double Mixer(int i) const {
    const LayerGeometry& layer = model_.layers[static_cast<size_t>(i)];
    switch (layer.kind) {
      case LayerKind::kNone:
        return 0;
      case LayerKind::kMla:
        return layer.compress > 0 ? Compressed(layer) : Latent(layer);
      case LayerKind::kRecurrent:
        return Recurrent(i);
      case LayerKind::kShared:
        return QueryAndOutput(model_.layers[static_cast<size_t>(layer.shared_with)]);
      default:
        break;
    }
    const bool key_is_value = Is("attention_k_eq_v") && layer.kind == LayerKind::kFull;
    double count = QueryAndOutput(layer);
    count += hidden_ * layer.n_kv_heads * (layer.head_dim_k + (key_is_value ? 0 : layer.head_dim_v));
    if (layer.index_dim > 0)
      count += hidden_ * layer.index_dim * 5;  // MiniMax-M3: four index queries, one key
    return count;
  }

  double QueryAndOutput(const LayerGeometry& layer) const {
    const double heads = layer.kind == LayerKind::kSliding
                             ? Number("swa_num_attention_heads", model_.n_query_heads)
                             : model_.n_query_heads;
    const double gate = Is("attn_output_gate") ? 2 : 1;
    return hidden_ * heads * (layer.head_dim_k * gate + layer.head_dim_v);
  }

  double Latent(const LayerGeometry& layer) const {
    const double heads = model_.n_query_heads, nope = Number("qk_nope_head_dim"),
                 rope = Number("qk_rope_head_dim"), value = Number("v_head_dim"),
                 latent = Number("kv_lora_rank"), query = Number("q_lora_rank");
    if (value <= 0 || latent <= 0 || nope + rope <= 0) return -1;
    double count =
        query > 0 ? hidden_ * query + query * heads * (nope + rope) : hidden_ * heads * (nope + rope);
    count += hidden_ * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden_;
    if (Is("mla_use_output_gate")) count += hidden_ * heads * value;
    if (layer.index_dim > 0) {
      const double indexers = Number("index_n_heads");
      count += query * indexers * layer.index_dim + hidden_ * (layer.index_dim + indexers);
    }
    return count;
  }

  // DeepSeek V4: low-rank queries and outputs, one key that is the value too, what compresses it.
  double Compressed(const LayerGeometry& layer) const {
    const double heads = model_.n_query_heads, width = layer.head_dim_k, query = Number("q_lora_rank"),
                 groups = Number("o_groups"), output = Number("o_lora_rank");
    if (query <= 0 || groups <= 0 || output <= 0) return -1;
    double count = hidden_ * query + query * heads * width + hidden_ * width;
    count += heads * width * output + groups * output * hidden_;
    if (layer.compress > 1) count += hidden_ * 2 * width * (layer.compress == 4 ? 2 : 1);
    if (layer.index_dim > 0) {
      const double indexers = Number("index_n_heads");
      count += query * indexers * layer.index_dim + hidden_ * (indexers + 4 * layer.index_dim);
    }
    return count;
  }

  double Recurrent(int i) const {
    if (config_.contains("linear_attn_config")) return Kda();
    const double k = Number("linear_num_key_heads") * Number("linear_key_head_dim");
    const double v = Number("linear_num_value_heads") * Number("linear_value_head_dim");
    if (k > 0 && v > 0) {
      return hidden_ * (2 * k + 2 * v + 2 * Number("linear_num_value_heads")) + v * hidden_ +
             Number("linear_conv_kernel_dim") * (2 * k + v);
    }
    if (Entry("layer_types", i) == "conv" || config_.contains("conv_L_cache")) {
      return 4 * hidden_ * hidden_ + hidden_ * Number("conv_L_cache");
    }
    const bool granite = config_.contains("mamba_n_heads");
    const double heads = Number(granite ? "mamba_n_heads" : "mamba_num_heads");
    const double inner = heads * Number(granite ? "mamba_d_head" : "mamba_head_dim");
    const double states = Number(granite ? "mamba_n_groups" : "n_groups") *
                          Number(granite ? "mamba_d_state" : "ssm_state_size");
    if (inner > 0) return hidden_ * (2 * inner + 2 * states + heads) + inner * hidden_;
    if (List("attn_type_list") != nullptr && Number("head_dim") > 0)  // lightning attention with a gate
      return 5 * hidden_ * model_.n_query_heads * Number("head_dim");
    return -1;
  }

  double Kda() const {
    const Json& linear = config_["linear_attn_config"];
    const auto number = [&](const char* field) {
      return linear.is_object() && linear.contains(field) && linear[field].is_number()
                 ? linear[field].get<double>()
                 : 0.0;
    };
    const double dim = number("head_dim"), heads = number("num_heads"), inner = dim * heads;
    if (inner <= 0) return -1;
    const bool full_gate =
        linear.contains("use_full_rank_gate") && linear["use_full_rank_gate"] == Json(true);
    const double gate = full_gate ? hidden_ * inner : (hidden_ + inner) * dim;
    return 4 * hidden_ * inner + (hidden_ + inner) * dim + gate + hidden_ * heads;
  }

  bool HasExperts(int i) const {
    if (model_.n_experts <= 0) return false;
    const std::string kind = Entry("mlp_layer_types", i);
    if (!kind.empty()) return kind == "sparse";
    const Json* only = List("mlp_only_layers");
    if (only != nullptr && std::find(only->begin(), only->end(), i) != only->end()) return false;
    const Json* layers = List("moe_layers");
    if (layers != nullptr && !layers->empty())
      return std::find(layers->begin(), layers->end(), i) != layers->end();
    if (i < Number("first_k_dense_replace")) return false;
    const std::string frequency = Entry("moe_layer_freq", i);
    if (!frequency.empty()) return frequency != "0";
    const auto step = [&](const char* field) { return static_cast<int>(std::max(1.0, Number(field, 1))); };
    return i % step("moe_layer_freq") == 0 && (i + 1) % step("decoder_sparse_step") == 0 &&
           (i + 1) % step("interleave_moe_layer_step") == 0;
  }

  // What Nemotron-H's pattern says of a layer, 0 for other models.
  char PatternOf(int i) const {
    if (absl::StartsWith(type_, "nemotron_h")) {
      const std::string block = Entry("layers_block_type", i);
      if (!block.empty())
        return block == "mamba" ? 'M' : block == "attention" ? '*' : block == "moe" ? 'E' : '-';
    }
    if (!config_.contains("hybrid_override_pattern") || !config_["hybrid_override_pattern"].is_string())
      return 0;
    const std::string pattern = config_["hybrid_override_pattern"].get<std::string>();
    return static_cast<size_t>(i) < pattern.size() ? pattern[static_cast<size_t>(i)] : 0;
  }

  bool ExpertLayer(int i) const {
    const char pattern = PatternOf(i);
    return pattern != 0 ? pattern == 'E' && model_.n_experts > 0 : HasExperts(i);
  }

  double Matrices() const {
    const bool plain = absl::StartsWith(type_, "nemotron_h");
    return plain ? 2 : 3;  // up and down, or gate, up and down
  }

  double ExpertWidth() const {
    const double width = Number("moe_intermediate_size");
    return width > 0 ? width : Number("intermediate_size");
  }

  // What routed experts work on, when that is not the width of the model.
  double ExpertInput() const {
    return std::max(Number("moe_latent_size"), Number("routed_expert_hidden_size"));
  }

  double Experts(int i) const {
    if (!ExpertLayer(i)) return 0;
    const double width = ExpertWidth(), input = ExpertInput() > 0 ? ExpertInput() : hidden_;
    return width > 0 ? model_.n_experts * Matrices() * input * width : -1;
  }

  // All of a layer's feed-forward part that every token uses.
  double FeedForward(int i) const {
    const char pattern = PatternOf(i);
    if (pattern == 'M' || pattern == '*') return 0;
    const Json* blocks = List("block_configs");
    if (blocks != nullptr && static_cast<size_t>(i) < blocks->size())
      return BlockFeedForward((*blocks)[static_cast<size_t>(i)]);
    const double plain = Number("intermediate_size");
    if (!ExpertLayer(i)) {
      double width = plain;
      for (const char* field : {"dense_intermediate_size", "intermediate_size_mlp"}) {
        if (Number(field) > 0) width = Number(field);
      }
      const bool shared = model_.layers[static_cast<size_t>(i)].kind == LayerKind::kShared;
      if (shared && Is("use_double_wide_mlp")) width *= 2;
      return width > 0 ? Matrices() * hidden_ * width : -1;
    }
    double count = hidden_ * model_.n_experts;  // router
    if (ExpertInput() > 0) count += 2 * hidden_ * ExpertInput();
    double shared = Number("shared_expert_intermediate_size", Number("share_expert_dim"));
    if (Number("moe_shared_expert_intermediate_size") > 0)
      shared = Number("moe_shared_expert_intermediate_size");
    if (shared == 0)
      shared = std::max(Number("n_shared_experts"), Number("num_shared_experts")) * ExpertWidth();
    if (shared == 0) shared = Number("shared_intermediate_size");
    if (absl::StartsWith(type_, "llama4")) shared = plain;  // one shared expert
    if (Is("enable_moe_block")) shared += plain;            // Gemma 4: a dense part beside the experts
    return count + Matrices() * hidden_ * shared;
  }

  // Nemotron-NAS: a width per block, rounded up to 256.
  double BlockFeedForward(const Json& block) const {
    if (!block.is_object() || !block.contains("ffn") || !block["ffn"].is_object()) return -1;
    const Json& part = block["ffn"];
    if (part.contains("no_op") && part["no_op"] == Json(true)) return 0;
    if (part.contains("replace_with_linear") && part["replace_with_linear"] == Json(true))
      return hidden_ * hidden_;
    if (!part.contains("ffn_mult") || !part["ffn_mult"].is_number()) return -1;
    const double width = std::floor(2 * part["ffn_mult"].get<double>() * hidden_ / 3);
    return width > 0 && width < 1e9 ? 3 * hidden_ * std::ceil(width / 256) * 256 : -1;
  }

  const Json& config_;
  const ModelGeometry& model_;
  const double hidden_;
  std::string type_;
};

}  // namespace

void CountParameters(const Json& config, ModelGeometry* model) {
  const ModelGeometry copy = *model;
  Counter(config, copy).Count(model);
}

}  // namespace kvtide::planner
