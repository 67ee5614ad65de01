#include "planner/model/config_json.h"

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::planner {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxField = int64_t{1} << 40;
constexpr int64_t kMaxLayers = 4096;

// Fields that look as if they could change the cache and that are understood or known not to.
const std::set<std::string>& KnownFields() {
  static const std::set<std::string> fields = {"attention_bias",
                                               "attention_chunk_size",
                                               "attention_dropout",
                                               "attention_k_eq_v",
                                               "attention_multiplier",
                                               "attention_out_bias",
                                               "attention_scale",
                                               "attn_implementation",
                                               "_attn_implementation",
                                               "_attn_implementation_autoset",
                                               "attn_scale",
                                               "attn_temperature_tuning",
                                               "attn_logit_softcapping",
                                               "attn_output_gate",
                                               "attn_pdrop",
                                               "attn_qkv_bias",
                                               "attn_factor",
                                               "cache_implementation",
                                               "conv_kernel",
                                               "decoder_sparse_step",
                                               "first_k_dense_replace",
                                               "floor_scale",
                                               "full_attention_interval",
                                               "global_head_dim",
                                               "head_dim",
                                               "hidden_size_per_layer_input",
                                               "hybrid_override_pattern",
                                               "index_head_dim",
                                               "index_n_heads",
                                               "index_topk",
                                               "interleave_moe_layer_step",
                                               "kv_lora_rank",
                                               "layer_norm_eps",
                                               "layer_norm_epsilon",
                                               "layer_types",
                                               "layers_block_type",
                                               "linear_conv_kernel_dim",
                                               "linear_key_head_dim",
                                               "linear_num_key_heads",
                                               "linear_num_value_heads",
                                               "linear_value_head_dim",
                                               "lm_head_bias",
                                               "mamba_head_dim",
                                               "mamba_hidden_act",
                                               "mamba_num_heads",
                                               "mamba_proj_bias",
                                               "mamba_ssm_dtype",
                                               "max_window_layers",
                                               "mlp_layer_types",
                                               "mlp_only_layers",
                                               "moe_layer_freq",
                                               "moe_layers",
                                               "mtp_num_hidden_layers",
                                               "n_head",
                                               "n_kv_heads",
                                               "n_layer",
                                               "n_layers",
                                               "nextn_layers",
                                               "no_rope_layer_interval",
                                               "no_rope_layers",
                                               "num_attention_heads",
                                               "num_global_key_value_heads",
                                               "num_hidden_layers",
                                               "num_key_value_heads",
                                               "num_kv_shared_layers",
                                               "num_mtp_layers",
                                               "num_nextn_predict_layers",
                                               "output_hidden_states",
                                               "output_attentions",
                                               "pre_attn_layernorm",
                                               "q_lora_rank",
                                               "qk_head_dim",
                                               "qk_nope_head_dim",
                                               "qk_rope_head_dim",
                                               "query_pre_attn_scalar",
                                               "residual_in_fp32",
                                               "sliding_window",
                                               "sliding_window_pattern",
                                               "ssm_state_size",
                                               "swiglu_limit",
                                               "tie_word_embeddings",
                                               "use_cache",
                                               "use_bidirectional_attention",
                                               "use_conv_bias",
                                               "use_mamba_kernels",
                                               "use_qk_norm",
                                               "use_sliding_window",
                                               "v_head_dim",
                                               "vocab_size_per_layer_input",
                                               "use_double_wide_mlp",
                                               "layer_scale",
                                               "rope_local_base_freq",
                                               "add_cross_attention",
                                               "cross_attention_hidden_size",
                                               "is_decoder",
                                               "is_encoder_decoder",
                                               "kv_scale",
                                               "qkv_bias",
                                               "clip_qkv",
                                               "num_heads",
                                               "max_batch_size",
                                               "mup_enabled",
                                               "router_z_loss_coef"};
  return fields;
}

bool LooksLikeCache(const std::string& field) {
  for (const char* word :
       {"window", "attention", "attn", "kv_", "_kv", "key_value", "head", "layer", "cache", "ssm", "mamba",
        "linear_", "conv", "chunk", "lora", "share", "recurrent", "state"}) {
    if (absl::StrContains(field, word)) return true;
  }
  return false;
}

// Changes nothing in a model that has it as null, false, 0 or an empty list.
bool IsOff(const Json& value) {
  if (value.is_null() || (value.is_boolean() && !value.get<bool>())) return true;
  if (value.is_number()) return value.get<double>() == 0;
  return (value.is_array() || value.is_object() || value.is_string()) && value.empty();
}

class ConfigReader {
 public:
  ConfigReader(const Json& config, const ReadOptions& options) : config_(config), options_(options) {}

  absl::StatusOr<ModelGeometry> Read(const std::string& name) {
    model_.name = name;
    model_.source = "config.json";
    model_.confidence = "high";
    type_ =
        config_.value("model_type", Json("")).is_string() ? config_.value("model_type", std::string()) : "";
    KVTIDE_RETURN_IF_ERROR(CheckUnknown());
    KVTIDE_RETURN_IF_ERROR(ReadBasics());
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<std::string> kinds, LayerKinds());
    for (int i = 0; i < layers_; ++i) {
      absl::StatusOr<LayerGeometry> layer = MakeLayer(kinds[static_cast<size_t>(i)]);
      if (!layer.ok()) return Annotate(layer.status(), absl::StrCat("layer ", i));
      model_.layers.push_back(*layer);
    }
    KVTIDE_RETURN_IF_ERROR(ShareLayers(kinds));
    KVTIDE_RETURN_IF_ERROR(ReadExperts());
    KVTIDE_RETURN_IF_ERROR(ValidateGeometry(model_));
    return model_;
  }

 private:
  bool Has(const char* field) const { return config_.contains(field) && !config_[field].is_null(); }

  absl::StatusOr<int64_t> Field(const char* field, int64_t fallback) const {
    if (!Has(field)) return fallback;
    const Json& value = config_[field];
    if (!value.is_number_integer() || value.get<double>() < 0 ||
        value.get<double>() > static_cast<double>(kMaxField)) {
      return absl::InvalidArgumentError(absl::StrCat("field '", field, "' is ", value.dump().substr(0, 64),
                                                     ", expected a whole number of 0 or more"));
    }
    return value.get<int64_t>();
  }

  absl::StatusOr<int64_t> Required(const char* field) const {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t value, Field(field, 0));
    if (value == 0) return absl::InvalidArgumentError(absl::StrCat("field '", field, "' is missing or 0"));
    return value;
  }

  bool Flag(const char* field, bool fallback) const {
    return Has(field) && config_[field].is_boolean() ? config_[field].get<bool>() : fallback;
  }

  void Assume(const std::string& what) { model_.assumptions.push_back(what); }

  absl::Status CheckUnknown() {
    for (const auto& [field, value] : config_.items()) {
      if (!LooksLikeCache(field) || KnownFields().count(field) > 0 || IsOff(value)) continue;
      if (!options_.ignore_unknown_fields) {
        return absl::InvalidArgumentError(
            absl::StrCat("unknown field '", field.substr(0, 128), "' = ", value.dump().substr(0, 64),
                         " may change the cache; --ignore-unknown-fields goes on without it"));
      }
      model_.uncounted.push_back(
          absl::StrCat("field '", field.substr(0, 128), "' is unknown and was ignored"));
    }
    return absl::OkStatus();
  }

  absl::Status ReadBasics() {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t layers, Required("num_hidden_layers"));
    if (layers > kMaxLayers)
      return absl::InvalidArgumentError(absl::StrCat("field 'num_hidden_layers' is ", layers));
    layers_ = static_cast<int>(layers);
    KVTIDE_ASSIGN_OR_RETURN(const int64_t heads, Required("num_attention_heads"));
    KVTIDE_ASSIGN_OR_RETURN(model_.n_embd, Required("hidden_size"));
    KVTIDE_ASSIGN_OR_RETURN(model_.n_vocab, Field("vocab_size", 0));
    KVTIDE_ASSIGN_OR_RETURN(model_.max_context, Field("max_position_embeddings", 0));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t kv_heads, Field("num_key_value_heads", 0));
    if (heads > 65536 || kv_heads > 65536)
      return absl::InvalidArgumentError("field 'num_attention_heads' is absurdly large");
    model_.n_query_heads = static_cast<int>(heads);
    kv_heads_ = static_cast<int>(kv_heads > 0 ? kv_heads : heads);
    if (kv_heads == 0) Assume("num_key_value_heads is missing: as many as attention heads");
    KVTIDE_ASSIGN_OR_RETURN(const int64_t head_dim, Field("head_dim", 0));
    if (head_dim == 0 && model_.n_embd % heads != 0 && !Has("kv_lora_rank")) {
      return absl::InvalidArgumentError(absl::StrCat("field 'head_dim' is missing and hidden_size ",
                                                     model_.n_embd, " is not a multiple of ", heads,
                                                     " heads"));
    }
    if (head_dim > 65536) return absl::InvalidArgumentError("field 'head_dim' is absurdly large");
    head_dim_ = static_cast<int>(head_dim > 0 ? head_dim : model_.n_embd / heads);
    if (head_dim == 0 && !Has("kv_lora_rank"))
      Assume(absl::StrCat("head_dim is missing: hidden_size / heads = ", head_dim_));
    KVTIDE_ASSIGN_OR_RETURN(window_, Field("sliding_window", 0));
    KVTIDE_ASSIGN_OR_RETURN(chunk_, Field("attention_chunk_size", 0));
    return absl::OkStatus();
  }

  // One of: full, sliding, chunked, linear, mamba, mla, none.
  absl::StatusOr<std::vector<std::string>> LayerKinds() {
    if (Has("kv_lora_rank")) return std::vector<std::string>(static_cast<size_t>(layers_), "mla");
    for (const char* field : {"layer_types", "layers_block_type"}) {
      if (Has(field)) return KindsFromList(field);
    }
    if (Has("hybrid_override_pattern")) return KindsFromPattern();
    return KindsFromRules();
  }

  absl::StatusOr<std::vector<std::string>> KindsFromList(const char* field) {
    static const std::pair<const char*, const char*> names[] = {{"full_attention", "full"},
                                                                {"attention", "full"},
                                                                {"sliding_attention", "sliding"},
                                                                {"local_attention", "sliding"},
                                                                {"chunked_attention", "chunked"},
                                                                {"linear_attention", "linear"},
                                                                {"mamba", "mamba"}};
    const Json& list = config_[field];
    if (!list.is_array() || list.size() < static_cast<size_t>(layers_)) {
      return absl::InvalidArgumentError(
          absl::StrCat("field '", field, "' is not a list of ", layers_, " names"));
    }
    std::vector<std::string> kinds;
    for (int i = 0; i < layers_; ++i) {
      const Json& entry = list[static_cast<size_t>(i)];
      std::string kind;
      for (const auto& name : names) {
        if (entry.is_string() && entry.get<std::string>() == name.first) kind = name.second;
      }
      if (kind.empty()) {
        return absl::InvalidArgumentError(absl::StrCat("field '", field, "' has unknown kind ",
                                                       entry.dump().substr(0, 64), " for layer ", i));
      }
      kinds.push_back(kind);
    }
    return kinds;
  }

  // Nemotron-H: M mamba, * attention, - MLP, E experts.
  absl::StatusOr<std::vector<std::string>> KindsFromPattern() {
    const Json& value = config_["hybrid_override_pattern"];
    const std::string pattern = value.is_string() ? value.get<std::string>() : "";
    if (pattern.size() != static_cast<size_t>(layers_)) {
      return absl::InvalidArgumentError(
          absl::StrCat("field 'hybrid_override_pattern' does not have ", layers_, " characters"));
    }
    std::vector<std::string> kinds;
    for (char c : pattern) {
      if (c != 'M' && c != '*' && c != '-' && c != 'E') {
        return absl::InvalidArgumentError(
            absl::StrCat("field 'hybrid_override_pattern' has unknown kind '", std::string(1, c), "'"));
      }
      kinds.push_back(c == 'M' ? "mamba" : c == '*' ? "full" : "none");
    }
    return kinds;
  }

  std::vector<std::string> Periodic(int64_t period, const char* most, const char* last) const {
    std::vector<std::string> kinds;
    for (int i = 0; i < layers_; ++i) kinds.push_back(i % period < period - 1 ? most : last);
    return kinds;
  }

  absl::StatusOr<std::vector<std::string>> KindsFromRules() {
    const std::vector<std::string> full(static_cast<size_t>(layers_), "full");
    KVTIDE_ASSIGN_OR_RETURN(const int64_t interval, Field("full_attention_interval", 0));
    if (interval > 0) return Periodic(interval, "linear", "full");
    if (Has("linear_num_key_heads")) {
      Assume("full_attention_interval is missing: 4");
      return Periodic(4, "linear", "full");
    }
    if (chunk_ > 0) {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t period, Field("no_rope_layer_interval", 4));
      if (!Has("no_rope_layer_interval")) Assume("chunked attention in 3 of 4 layers (no layer_types)");
      return Periodic(std::max<int64_t>(1, period), "chunked", "full");
    }
    if (window_ == 0) return full;
    KVTIDE_ASSIGN_OR_RETURN(int64_t period, Field("sliding_window_pattern", 0));
    if (period == 0) period = DefaultPeriod();
    if (period > 0) return Periodic(period, "sliding", "full");
    const bool qwen = absl::StartsWith(type_, "qwen");
    if (!Flag("use_sliding_window", !qwen)) {
      Assume(absl::StrCat("sliding_window ", window_, " is not used (use_sliding_window is false)"));
      return full;
    }
    std::vector<std::string> kinds(static_cast<size_t>(layers_), "sliding");
    KVTIDE_ASSIGN_OR_RETURN(const int64_t first, Field("max_window_layers", 0));
    for (int64_t i = 0; i < std::min<int64_t>(qwen ? first : 0, layers_); ++i)
      kinds[static_cast<size_t>(i)] = "full";
    return kinds;
  }

  int64_t DefaultPeriod() {
    static const std::pair<const char*, int> periods[] = {
        {"gemma3", 6}, {"gemma2", 2}, {"cohere2", 4}, {"gpt_oss", 2}};
    for (const auto& entry : periods) {
      if (!absl::StartsWith(type_, entry.first)) continue;
      Assume(
          absl::StrCat("sliding_window_pattern is missing: ", entry.second, " as ", entry.first, " has it"));
      return entry.second;
    }
    return 0;
  }

  absl::StatusOr<LayerGeometry> MakeLayer(const std::string& kind) {
    LayerGeometry layer;
    layer.n_kv_heads = kv_heads_;
    layer.head_dim_k = layer.head_dim_v = head_dim_;
    if (kind == "mla") {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t latent, Required("kv_lora_rank"));
      KVTIDE_ASSIGN_OR_RETURN(const int64_t rope, Required("qk_rope_head_dim"));
      if (latent + rope > 65536) return absl::InvalidArgumentError("field 'kv_lora_rank' is absurdly large");
      return LayerGeometry{LayerKind::kMla, 1, static_cast<int>(latent + rope), 0};
    }
    if (kind == "sliding" || kind == "chunked") {
      layer.kind = kind == "sliding" ? LayerKind::kSliding : LayerKind::kChunked;
      const int64_t window = kind == "sliding" ? window_ : chunk_;
      if (window < 1 || window > INT32_MAX) {
        return absl::InvalidArgumentError(
            absl::StrCat("field '", kind == "sliding" ? "sliding_window" : "attention_chunk_size", "' is ",
                         window, " but the layer is ", kind));
      }
      layer.window = static_cast<int>(window);
      return layer;
    }
    if (kind == "linear" || kind == "mamba") {
      layer = LayerGeometry{};
      layer.kind = LayerKind::kRecurrent;
      KVTIDE_ASSIGN_OR_RETURN(layer.state_bytes, kind == "linear" ? LinearState() : MambaState());
      return layer;
    }
    if (kind == "none") {
      layer = LayerGeometry{};
      layer.kind = LayerKind::kNone;
      return layer;
    }
    // Gemma 4: full layers have heads of their own.
    KVTIDE_ASSIGN_OR_RETURN(const int64_t global_dim, Field("global_head_dim", 0));
    if (global_dim > 65536) return absl::InvalidArgumentError("field 'global_head_dim' is absurdly large");
    if (global_dim > 0) layer.head_dim_k = layer.head_dim_v = static_cast<int>(global_dim);
    KVTIDE_ASSIGN_OR_RETURN(const int64_t global_heads, Field("num_global_key_value_heads", 0));
    if (global_heads > 0 && Flag("attention_k_eq_v", false))
      layer.n_kv_heads = static_cast<int>(std::min<int64_t>(global_heads, 65536));
    return layer;
  }

  // Gated delta net: convolution inputs and one matrix per value head, in f32.
  absl::StatusOr<int64_t> LinearState() {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t k_heads, Required("linear_num_key_heads"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t v_heads, Required("linear_num_value_heads"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t k_dim, Required("linear_key_head_dim"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t v_dim, Required("linear_value_head_dim"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t conv, Required("linear_conv_kernel_dim"));
    return StateBytes(conv, v_heads * v_dim, k_heads * k_dim, k_dim, {k_heads, v_heads, k_dim, v_dim, conv});
  }

  absl::StatusOr<int64_t> MambaState() {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t heads, Required("mamba_num_heads"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t dim, Required("mamba_head_dim"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t state, Required("ssm_state_size"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t groups, Required("n_groups"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t conv, Required("conv_kernel"));
    return StateBytes(conv, heads * dim, groups * state, state, {heads, dim, state, groups, conv});
  }

  static absl::StatusOr<int64_t> StateBytes(int64_t conv, int64_t inner, int64_t keys, int64_t state,
                                            const std::vector<int64_t>& fields) {
    for (int64_t field : fields) {
      if (field > 65536)
        return absl::InvalidArgumentError(
            absl::StrCat("a recurrent dimension of ", field, " is absurdly large"));
    }
    return 4 * ((conv - 1) * (inner + 2 * keys) + state * inner);
  }

  absl::Status ShareLayers(const std::vector<std::string>& kinds) {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shared, Field("num_kv_shared_layers", 0));
    if (shared == 0) return absl::OkStatus();
    if (shared >= layers_) {
      return absl::InvalidArgumentError(
          absl::StrCat("field 'num_kv_shared_layers' is ", shared, " of ", layers_, " layers"));
    }
    const int owners = layers_ - static_cast<int>(shared);
    for (int i = owners; i < layers_; ++i) {
      int owner = owners - 1;
      while (owner >= 0 && kinds[static_cast<size_t>(owner)] != kinds[static_cast<size_t>(i)]) --owner;
      if (owner < 0) {
        return absl::InvalidArgumentError(absl::StrCat("layer ", i, " shares a cache, but no earlier ",
                                                       kinds[static_cast<size_t>(i)], " layer owns one"));
      }
      model_.layers[static_cast<size_t>(i)] = LayerGeometry{};
      model_.layers[static_cast<size_t>(i)].kind = LayerKind::kShared;
      model_.layers[static_cast<size_t>(i)].shared_with = owner;
    }
    return absl::OkStatus();
  }

  absl::Status ReadExperts() {
    for (const char* field : {"num_experts", "num_local_experts", "n_routed_experts"}) {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t experts, Field(field, 0));
      if (experts > 0) model_.n_experts = static_cast<int>(std::min<int64_t>(experts, 1 << 20));
    }
    for (const char* field : {"num_experts_per_tok", "top_k_experts"}) {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t used, Field(field, 0));
      if (used > 0) model_.n_experts_used = static_cast<int>(std::min<int64_t>(used, 1 << 20));
    }
    if (Has("index_head_dim")) model_.uncounted.push_back("the keys of the sparse-attention indexer");
    if (Has("num_nextn_predict_layers")) Assume("the cache of next-token prediction layers is not counted");
    KVTIDE_RETURN_IF_ERROR(ReadFeedForward());
    return absl::OkStatus();
  }

  absl::Status ReadFeedForward() {
    KVTIDE_ASSIGN_OR_RETURN(model_.n_ff, Field("intermediate_size", 0));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t expert, Field("moe_intermediate_size", 0));
    if (model_.n_experts == 0) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shared, Field("n_shared_experts", 0));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shared_width, Field("shared_expert_intermediate_size", 0));
    const int64_t width = expert > 0 ? expert : model_.n_ff;
    if (width > 1 << 24 || shared > 1 << 16 || shared_width > 1 << 24)
      return absl::InvalidArgumentError("field 'moe_intermediate_size' is absurdly large");
    model_.n_ff = width * (model_.n_experts_used + shared) + shared_width;
    return absl::OkStatus();
  }

  const Json& config_;
  const ReadOptions options_;
  ModelGeometry model_;
  std::string type_;
  int layers_ = 0;
  int kv_heads_ = 0;
  int head_dim_ = 0;
  int64_t window_ = 0;
  int64_t chunk_ = 0;
};

}  // namespace

absl::StatusOr<ModelGeometry> GeometryFromConfigJson(const std::string& text, const std::string& name,
                                                     const ReadOptions& options) {
  const Json root = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded() || !root.is_object())
    return absl::InvalidArgumentError("config.json is not a JSON object");
  const bool nested = root.contains("text_config") && root["text_config"].is_object();
  return ConfigReader(nested ? root["text_config"] : root, options).Read(name);
}

}  // namespace kvtide::planner
