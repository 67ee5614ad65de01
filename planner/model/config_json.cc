#include "planner/model/config_json.h"

#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "planner/model/config_fields.h"
#include "planner/model/config_object.h"
#include "planner/model/config_parameters.h"
#include "planner/model/key_traits.h"

namespace kvtide::planner {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxLayers = 4096;
constexpr int kMaxDimension = 65536;

// Changes nothing in a model that has it as null, false, 0 or an empty list.
bool IsOff(const Json& value) {
  if (value.is_null() || (value.is_boolean() && !value.get<bool>())) return true;
  if (value.is_number()) return value.get<double>() == 0;
  return (value.is_array() || value.is_object() || value.is_string()) && value.empty();
}

class ConfigReader {
 public:
  ConfigReader(const ConfigObject& config, const ReadOptions& options)
      : fields_(config), config_(config.json()), options_(options) {}

  absl::StatusOr<ModelGeometry> Read(const std::string& name) {
    model_.name = name;
    model_.source = "config.json";
    model_.confidence = "high";
    type_ = fields_.Family();
    KVTIDE_RETURN_IF_ERROR(CheckUnknown());
    KVTIDE_RETURN_IF_ERROR(ReadBasics());
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<std::string> kinds, LayerKinds());
    KVTIDE_RETURN_IF_ERROR(ReadIndexer());
    for (int i = 0; i < layers_; ++i) {
      absl::StatusOr<LayerGeometry> layer = MakeLayer(kinds[static_cast<size_t>(i)], i);
      if (!layer.ok()) return Annotate(layer.status(), absl::StrCat("layer ", i));
      model_.layers.push_back(*layer);
    }
    KVTIDE_RETURN_IF_ERROR(ShareLayers(kinds));
    KVTIDE_RETURN_IF_ERROR(ReadExperts());
    KVTIDE_RETURN_IF_ERROR(ReadExtraLayers());
    KVTIDE_RETURN_IF_ERROR(ValidateGeometry(model_));
    CountParameters(config_, &model_);
    ReadKeyTraits();
    return model_;
  }

 private:
  // A number that has to be a sensible width or count of heads.
  absl::StatusOr<int> Dimension(const char* field, int fallback) const {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t value, fields_.Whole(field, fallback));
    if (value > kMaxDimension)
      return absl::InvalidArgumentError(absl::StrCat("field '", field, "' is absurdly large"));
    return static_cast<int>(value);
  }

  // A list of one number per layer.
  absl::StatusOr<std::vector<int64_t>> PerLayer(const char* field) const {
    const Json& list = config_[field];
    std::vector<int64_t> values;
    if (list.is_array() && list.size() >= static_cast<size_t>(layers_)) {
      for (int i = 0; i < layers_; ++i) {
        const Json& entry = list[static_cast<size_t>(i)];
        if (entry.is_number_integer() && entry.get<double>() >= 0 && entry.get<double>() <= kMaxDimension)
          values.push_back(entry.get<int64_t>());
      }
    }
    if (values.size() != static_cast<size_t>(layers_)) {
      return absl::InvalidArgumentError(
          absl::StrCat("field '", field, "' is not a list of ", layers_, " numbers"));
    }
    return values;
  }

  void Assume(const std::string& what) { model_.assumptions.push_back(what); }

  absl::Status CheckUnknown() {
    for (const auto& [field, value] : config_.items()) {
      if (!UnknownCacheField(field) || IsOff(value)) continue;
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

  // The family says it, unless the file does.
  void ReadKeyTraits() {
    model_.key_traits = KeyTraitsOfFamily(type_);
    const auto read = [&](const char* field, Answer* answer) {
      if (fields_.Has(field) && config_[field].is_boolean())
        *answer = config_[field].get<bool>() ? Answer::kYes : Answer::kNo;
    };
    for (const char* field : {"attention_bias", "qkv_bias", "add_qkv_bias"})
      read(field, &model_.key_traits.bias);
    for (const char* field : {"use_qk_norm", "qk_layernorm"}) read(field, &model_.key_traits.norm);
  }

  bool IsGemmaWithWindows() const { return type_ == "gemma2" || type_ == "gemma3" || type_ == "gemma3_text"; }

  absl::Status ReadBasics() {
    int64_t layers = 0;
    if (!fields_.Has("num_hidden_layers") && fields_.Has("layers_block_type") &&
        config_["layers_block_type"].is_array()) {
      layers = static_cast<int64_t>(config_["layers_block_type"].size());
    } else {
      KVTIDE_ASSIGN_OR_RETURN(layers, fields_.Required("num_hidden_layers"));
    }
    if (layers > kMaxLayers)
      return absl::InvalidArgumentError(absl::StrCat("field 'num_hidden_layers' is ", layers));
    layers_ = static_cast<int>(layers);
    KVTIDE_ASSIGN_OR_RETURN(const int64_t heads, fields_.Required("num_attention_heads"));
    KVTIDE_ASSIGN_OR_RETURN(model_.n_embd, fields_.Required("hidden_size"));
    KVTIDE_ASSIGN_OR_RETURN(model_.n_vocab, fields_.Whole("vocab_size", 0));
    KVTIDE_ASSIGN_OR_RETURN(model_.max_context, fields_.Whole("max_position_embeddings", 0));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t kv_heads, fields_.Whole("num_key_value_heads", 0));
    if (heads > 65536 || kv_heads > 65536)
      return absl::InvalidArgumentError("field 'num_attention_heads' is absurdly large");
    model_.n_query_heads = static_cast<int>(heads);
    kv_heads_ = static_cast<int>(kv_heads > 0 ? kv_heads : heads);
    if (kv_heads == 0 && !fields_.Has("block_configs"))
      Assume("num_key_value_heads is missing: as many as attention heads");
    KVTIDE_ASSIGN_OR_RETURN(int64_t head_dim, fields_.Whole("head_dim", 0));
    if (head_dim == 0) {  // Nemotron-H of 2025
      KVTIDE_ASSIGN_OR_RETURN(head_dim, fields_.Whole("attention_head_dim", 0));
    }
    // What configurations leave out as it is the default of their class (transformers 5.24.0,
    // models/gemma2/configuration_gemma2.py and gemma3).
    if (head_dim == 0 && (type_ == "gemma" || IsGemmaWithWindows())) {
      head_dim = 256;
      Assume("head_dim is missing: 256 as Gemma has it");
    }
    if (head_dim == 0 && model_.n_embd % heads != 0 && !fields_.Has("kv_lora_rank")) {
      return absl::InvalidArgumentError(absl::StrCat("field 'head_dim' is missing and hidden_size ",
                                                     model_.n_embd, " is not a multiple of ", heads,
                                                     " heads"));
    }
    const int64_t width = head_dim > 0 ? head_dim : model_.n_embd / heads;
    if (width > kMaxDimension)
      return absl::InvalidArgumentError(
          absl::StrCat("field '", head_dim > 0 ? "head_dim" : "hidden_size", "' is absurdly large"));
    head_dim_ = static_cast<int>(width);
    if (head_dim == 0 && !fields_.Has("kv_lora_rank"))
      Assume(absl::StrCat("head_dim is missing: hidden_size / heads = ", head_dim_));
    KVTIDE_ASSIGN_OR_RETURN(value_dim_, Dimension("v_head_dim", head_dim_));
    KVTIDE_ASSIGN_OR_RETURN(window_, fields_.Whole("sliding_window", 0));
    if (IsGemmaWithWindows() && !config_.contains("sliding_window")) {
      window_ = 4096;
      Assume("sliding_window is missing: 4096 as Gemma has it");
    }
    KVTIDE_ASSIGN_OR_RETURN(chunk_, fields_.Whole("attention_chunk_size", 0));
    return absl::OkStatus();
  }

  // One of: full, sliding, chunked, linear, kda, lightning, mamba, conv, mla, compressed, none.
  absl::StatusOr<std::vector<std::string>> LayerKinds() {
    const std::string attention = fields_.Has("kv_lora_rank") ? "mla" : "full";
    if (fields_.Has("compress_ratios"))
      return std::vector<std::string>(static_cast<size_t>(layers_), "compressed");
    if (fields_.Has("block_configs")) return KindsFromBlocks();
    if (fields_.Has("linear_attn_config")) return KindsFromLists(attention);
    for (const char* field : {"layer_types", "layers_block_type"}) {
      if (fields_.Has(field)) return KindsFromList(field, attention);
    }
    if (fields_.Has("hybrid_override_pattern")) return KindsFromPattern();
    if (fields_.Has("hybrid_layer_pattern")) return KindsFromFlags("hybrid_layer_pattern", "full", "sliding");
    if (fields_.Has("attn_type_list")) return KindsFromFlags("attn_type_list", "lightning", "full");
    if (fields_.Has("full_attn_idxs")) return KindsFromIndices("full_attn_idxs", "conv", "full");
    if (attention == "mla") {
      if (fields_.Has("layer_group_size"))
        return absl::InvalidArgumentError("field 'layer_group_size' with latent attention is not understood");
      return std::vector<std::string>(static_cast<size_t>(layers_), "mla");
    }
    return KindsFromRules();
  }

  // MiMo: 1 slides. MiniMax: 0 is lightning attention.
  absl::StatusOr<std::vector<std::string>> KindsFromFlags(const char* field, const char* zero,
                                                          const char* one) {
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<int64_t> flags, PerLayer(field));
    std::vector<std::string> kinds;
    for (const int64_t flag : flags) {
      if (flag > 1)
        return absl::InvalidArgumentError(absl::StrCat("field '", field, "' has unknown kind ", flag));
      kinds.push_back(flag == 0 ? zero : one);
    }
    return kinds;
  }

  // LFM2: the layers of a list attend, the others are short convolutions.
  absl::StatusOr<std::vector<std::string>> KindsFromIndices(const char* field, const char* most,
                                                            const char* listed) {
    std::vector<std::string> kinds(static_cast<size_t>(layers_), most);
    KVTIDE_RETURN_IF_ERROR(MarkLayers(config_[field], field, 0, listed, &kinds));
    return kinds;
  }

  // Kimi-Linear: two lists of layers, counted from 1.
  absl::StatusOr<std::vector<std::string>> KindsFromLists(const std::string& attention) {
    const Json& lists = config_["linear_attn_config"];
    std::vector<std::string> kinds(static_cast<size_t>(layers_));
    for (const auto& [field, kind] : {std::pair<const char*, std::string>{"kda_layers", "kda"},
                                      std::pair<const char*, std::string>{"full_attn_layers", attention}}) {
      if (!lists.is_object() || !lists.contains(field)) {
        return absl::InvalidArgumentError(
            absl::StrCat("field 'linear_attn_config' has no list '", field, "'"));
      }
      KVTIDE_RETURN_IF_ERROR(MarkLayers(lists[field], field, 1, kind, &kinds));
    }
    for (int i = 0; i < layers_; ++i) {
      if (kinds[static_cast<size_t>(i)].empty()) {
        return absl::InvalidArgumentError(
            absl::StrCat("field 'linear_attn_config' does not say what layer ", i, " is"));
      }
    }
    return kinds;
  }

  absl::Status MarkLayers(const Json& list, const char* field, int64_t first, const std::string& kind,
                          std::vector<std::string>* kinds) const {
    const auto bad = [&] {
      return absl::InvalidArgumentError(absl::StrCat("field '", field, "' is not a list of layers from ",
                                                     first, " to ", layers_ - 1 + first));
    };
    if (!list.is_array()) return bad();
    for (const Json& entry : list) {
      if (!entry.is_number_integer() || entry.get<double>() < static_cast<double>(first) ||
          entry.get<double>() >= static_cast<double>(layers_ + first))
        return bad();
      (*kinds)[static_cast<size_t>(entry.get<int64_t>() - first)] = kind;
    }
    return absl::OkStatus();
  }

  // Nemotron-NAS: every block says whether it attends, and how many query heads share a KV head.
  absl::StatusOr<std::vector<std::string>> KindsFromBlocks() {
    const Json& blocks = config_["block_configs"];
    if (!blocks.is_array() || blocks.size() != static_cast<size_t>(layers_))
      return absl::InvalidArgumentError(
          absl::StrCat("field 'block_configs' is not a list of ", layers_, " blocks"));
    std::vector<std::string> kinds;
    for (const Json& block : blocks) {
      const std::string place = absl::StrCat("block ", kinds.size(), " of 'block_configs'");
      if (!block.is_object() || !block.contains("attention") || !block["attention"].is_object())
        return absl::InvalidArgumentError(absl::StrCat(place, " has no 'attention'"));
      const Json& attention = block["attention"];
      int group = 0;
      bool none = false;
      for (const auto& [field, value] : attention.items()) {
        if (field == "n_heads_in_group" && value.is_number_integer() && value.get<double>() >= 1 &&
            value.get<double>() <= kMaxDimension) {
          group = value.get<int>();
        } else if (field == "no_op" && value.is_boolean()) {
          none = value.get<bool>();
        } else if (field == "replace_with_linear" && value.is_boolean() && value.get<bool>()) {
          none = true;
        } else if (!IsOff(value)) {
          return absl::InvalidArgumentError(
              absl::StrCat(place, " has unknown '", field.substr(0, 64), "' = ", value.dump().substr(0, 64)));
        }
      }
      if (!none && group == 0)
        return absl::InvalidArgumentError(absl::StrCat(place, " has no 'n_heads_in_group'"));
      kinds.push_back(none ? "none" : "full");
      block_kv_heads_.push_back(none ? 0 : std::max(1, model_.n_query_heads / group));
    }
    return kinds;
  }

  absl::StatusOr<std::vector<std::string>> KindsFromList(const char* field, const std::string& attention) {
    static const std::pair<const char*, const char*> names[] = {{"full_attention", "full"},
                                                                {"attention", "full"},
                                                                {"deepseek_sparse_attention", "full"},
                                                                {"conv", "conv"},
                                                                {"sliding_attention", "sliding"},
                                                                {"local_attention", "sliding"},
                                                                {"chunked_attention", "chunked"},
                                                                {"linear_attention", "linear"},
                                                                {"mamba", "mamba"},
                                                                {"mlp", "none"},
                                                                {"moe", "none"}};
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
      if (attention == "mla" && kind == "linear" && fields_.Has("kda_head_dim")) kind = "kda";
      if (attention == "mla" && kind != "full" && kind != "kda" && kind != "linear") {
        return absl::InvalidArgumentError(
            absl::StrCat("layer ", i, " is ", kind, " in a model of latent attention: not understood"));
      }
      kinds.push_back(kind == "full" ? attention : kind);
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
    KVTIDE_ASSIGN_OR_RETURN(const int64_t interval, fields_.Whole("full_attention_interval", 0));
    if (interval > 0) return Periodic(interval, "linear", "full");
    if (fields_.Has("linear_num_key_heads")) {
      Assume("full_attention_interval is missing: 4");
      return Periodic(4, "linear", "full");
    }
    if (chunk_ > 0) {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t period, fields_.Whole("no_rope_layer_interval", 4));
      if (!fields_.Has("no_rope_layer_interval"))
        Assume("chunked attention in 3 of 4 layers (no layer_types)");
      return Periodic(std::max<int64_t>(1, period), "chunked", "full");
    }
    if (window_ == 0) return full;
    KVTIDE_ASSIGN_OR_RETURN(int64_t period, fields_.Whole("sliding_window_pattern", 0));
    if (period == 0) {  // as transformers writes it of Gemma 3
      KVTIDE_ASSIGN_OR_RETURN(period, fields_.Whole("_sliding_window_pattern", 0));
    }
    // Command R7B says it twice; both count layers up to a full one (transformers 5.24.0,
    // models/cohere2/configuration_cohere2.py: sliding where (i + 1) % pattern is not 0, 4 by default).
    if (period == 0) {
      KVTIDE_ASSIGN_OR_RETURN(period, fields_.Whole("layer_switch", 0));
    }
    if (period == 0) period = DefaultPeriod();
    if (period > 0) return Periodic(period, "sliding", "full");
    const bool qwen = absl::StartsWith(type_, "qwen");
    KVTIDE_ASSIGN_OR_RETURN(const bool slides, fields_.Flag("use_sliding_window", !qwen));
    if (!slides) {
      Assume(absl::StrCat("sliding_window ", window_, " is not used (use_sliding_window is false)"));
      return full;
    }
    if (absl::StartsWith(type_, "phi") && model_.max_context > 0 && window_ > model_.max_context) {
      Assume(absl::StrCat("sliding_window ", window_, " is not smaller than the context: full attention"));
      return full;
    }
    std::vector<std::string> kinds(static_cast<size_t>(layers_), "sliding");
    KVTIDE_ASSIGN_OR_RETURN(const int64_t first, fields_.Whole("max_window_layers", 0));
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

  // The width of the indexer's keys per layer, 0 where a layer has none or uses the selection of another.
  absl::Status ReadIndexer() {
    index_dims_.assign(static_cast<size_t>(layers_), 0);
    if (fields_.Has("sparse_attention_config")) return ReadBlockSparse();
    KVTIDE_ASSIGN_OR_RETURN(const int width, Dimension("index_head_dim", 0));
    if (width == 0) return absl::OkStatus();
    index_dims_.assign(static_cast<size_t>(layers_), width);
    if (fields_.Has("compress_ratios")) return absl::OkStatus();
    if (!fields_.Has("kv_lora_rank"))
      return absl::InvalidArgumentError("field 'index_head_dim' without 'kv_lora_rank' is not understood");
    if (!fields_.Has("indexer_types")) {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t every, fields_.Whole("index_topk_freq", 1));
      if (every > 1)
        return absl::InvalidArgumentError(
            "field 'index_topk_freq' is above 1 but 'indexer_types' does not say which layers have an "
            "indexer");
      return absl::OkStatus();
    }
    const Json& types = config_["indexer_types"];
    if (!types.is_array() || types.size() < static_cast<size_t>(layers_))
      return absl::InvalidArgumentError(
          absl::StrCat("field 'indexer_types' is not a list of ", layers_, " names"));
    for (int i = 0; i < layers_; ++i) {
      const Json& type = types[static_cast<size_t>(i)];
      if (type == "shared") index_dims_[static_cast<size_t>(i)] = 0;
      if (type != "shared" && type != "full")
        return absl::InvalidArgumentError(absl::StrCat("field 'indexer_types' has unknown kind ",
                                                       type.dump().substr(0, 64), " for layer ", i));
    }
    return absl::OkStatus();
  }

  // MiniMax-M3: one index key per token in the layers that pick blocks.
  absl::Status ReadBlockSparse() {
    const Json& sparse = config_["sparse_attention_config"];
    const auto has = [&](const char* field) { return sparse.is_object() && sparse.contains(field); };
    if (has("use_sparse_attention") && sparse["use_sparse_attention"] == false) return absl::OkStatus();
    if (!has("sparse_index_dim") || !has("sparse_attention_freq") ||
        !sparse["sparse_index_dim"].is_number_integer() || sparse["sparse_index_dim"].get<double>() < 1 ||
        sparse["sparse_index_dim"].get<double>() > kMaxDimension ||
        !sparse["sparse_attention_freq"].is_array() ||
        sparse["sparse_attention_freq"].size() != static_cast<size_t>(layers_)) {
      return absl::InvalidArgumentError(
          "field 'sparse_attention_config' needs 'sparse_index_dim' and one flag per layer in "
          "'sparse_attention_freq'");
    }
    for (int i = 0; i < layers_; ++i) {
      if (sparse["sparse_attention_freq"][static_cast<size_t>(i)] != 0)
        index_dims_[static_cast<size_t>(i)] = sparse["sparse_index_dim"].get<int>();
    }
    return absl::OkStatus();
  }

  static LayerGeometry Recurrent(int64_t conv_elements, int64_t state_elements) {
    LayerGeometry layer;
    layer.kind = LayerKind::kRecurrent;
    layer.conv_bytes = 4 * conv_elements;
    layer.state_bytes = 4 * (conv_elements + state_elements);
    return layer;
  }

  absl::StatusOr<LayerGeometry> MakeLayer(const std::string& kind, int index) {
    if (kind == "linear") return LinearState();
    if (kind == "kda") return KdaState();
    if (kind == "mamba") return MambaState();
    if (kind == "conv") return ConvState();
    // MiniMax-01: one matrix per head. Engines that run it keep it in 16 bits.
    if (kind == "lightning") return Recurrent(0, int64_t{model_.n_query_heads} * head_dim_ * head_dim_ / 2);
    if (kind == "compressed") return CompressedLayer(index);
    LayerGeometry layer;
    layer.n_kv_heads = block_kv_heads_.empty() ? kv_heads_ : block_kv_heads_[static_cast<size_t>(index)];
    layer.head_dim_k = head_dim_;
    layer.head_dim_v = value_dim_;
    if (kind == "none") {
      layer = LayerGeometry{};
      layer.kind = LayerKind::kNone;
      return layer;
    }
    layer.index_dim = index_dims_[static_cast<size_t>(index)];
    if (kind == "mla") {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t latent, fields_.Required("kv_lora_rank"));
      KVTIDE_ASSIGN_OR_RETURN(const int64_t rope, fields_.Whole("qk_rope_head_dim", 0));
      if (!fields_.Has("qk_rope_head_dim"))
        return absl::InvalidArgumentError("field 'qk_rope_head_dim' is missing");
      if (latent + rope > kMaxDimension)
        return absl::InvalidArgumentError("field 'kv_lora_rank' is absurdly large");
      layer.kind = LayerKind::kMla;
      layer.n_kv_heads = 1;
      layer.head_dim_k = static_cast<int>(latent + rope);
      layer.head_dim_v = 0;
      return layer;
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
      // MiMo: sliding layers have heads of their own.
      KVTIDE_ASSIGN_OR_RETURN(layer.n_kv_heads, Dimension("swa_num_key_value_heads", layer.n_kv_heads));
      KVTIDE_ASSIGN_OR_RETURN(layer.head_dim_k, Dimension("swa_head_dim", layer.head_dim_k));
      KVTIDE_ASSIGN_OR_RETURN(layer.head_dim_v, Dimension("swa_v_head_dim", layer.head_dim_v));
      return layer;
    }
    // Gemma 4: full layers have heads of their own.
    KVTIDE_ASSIGN_OR_RETURN(const int global_dim, Dimension("global_head_dim", 0));
    if (global_dim > 0) layer.head_dim_k = layer.head_dim_v = global_dim;
    KVTIDE_ASSIGN_OR_RETURN(const int global_heads, Dimension("num_global_key_value_heads", 0));
    KVTIDE_ASSIGN_OR_RETURN(const bool shared, fields_.Flag("attention_k_eq_v", false));
    if (global_heads > 0 && shared) layer.n_kv_heads = global_heads;
    return layer;
  }

  // DeepSeek V4.
  absl::StatusOr<LayerGeometry> CompressedLayer(int index) {
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<int64_t> ratios, PerLayer("compress_ratios"));
    if (window_ < 1 || window_ > INT32_MAX)
      return absl::InvalidArgumentError("field 'sliding_window' is missing beside 'compress_ratios'");
    const int64_t ratio = ratios[static_cast<size_t>(index)];
    if (ratio != 0 && ratio != 4 && ratio != 128) {
      return absl::InvalidArgumentError(absl::StrCat("field 'compress_ratios' has ", ratio, " for layer ",
                                                     index, ", expected 0, 4 or 128"));
    }
    return CompressedLatent(head_dim_, static_cast<int>(window_),
                            static_cast<int>(std::max<int64_t>(1, ratio)),
                            index_dims_[static_cast<size_t>(index)]);
  }

  // Gated delta net: convolution inputs and one matrix per value head.
  absl::StatusOr<LayerGeometry> LinearState() {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t k_heads, fields_.Required("linear_num_key_heads"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t v_heads, fields_.Required("linear_num_value_heads"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t k_dim, fields_.Required("linear_key_head_dim"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t v_dim, fields_.Required("linear_value_head_dim"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t conv, fields_.Required("linear_conv_kernel_dim"));
    KVTIDE_RETURN_IF_ERROR(CheckDimensions({k_heads, v_heads, k_dim, v_dim, conv}));
    return Recurrent((conv - 1) * (v_heads * v_dim + 2 * k_heads * k_dim), k_dim * v_heads * v_dim);
  }

  // Kimi delta attention: convolution inputs of q, k and v, and one matrix per head.
  absl::StatusOr<LayerGeometry> KdaState() const {
    int64_t values[3] = {};
    const char* const fields[3] = {"num_heads", "head_dim", "short_conv_kernel_size"};
    const Json empty = Json::object();
    const Json& linear = fields_.Has("linear_attn_config") ? config_["linear_attn_config"] : empty;
    for (int i = 0; i < 3; ++i) {
      if (!linear.is_object() || !linear.contains(fields[i]) || !linear[fields[i]].is_number_integer() ||
          linear[fields[i]].get<double>() < 1 || linear[fields[i]].get<double>() > kMaxDimension) {
        return absl::InvalidArgumentError(
            absl::StrCat("field 'linear_attn_config' has no sensible '", fields[i], "'"));
      }
      values[i] = linear[fields[i]].get<int64_t>();
    }
    const auto [heads, dim, conv] = values;
    return Recurrent(3 * (conv - 1) * heads * dim, dim * dim * heads);
  }

  // Mamba-2, in the words of Nemotron-H or of Granite.
  absl::StatusOr<LayerGeometry> MambaState() {
    const bool granite = fields_.Has("mamba_n_heads");
    KVTIDE_ASSIGN_OR_RETURN(const int64_t heads,
                            fields_.Required(granite ? "mamba_n_heads" : "mamba_num_heads"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t dim, fields_.Required(granite ? "mamba_d_head" : "mamba_head_dim"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t state,
                            fields_.Required(granite ? "mamba_d_state" : "ssm_state_size"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t groups, fields_.Required(granite ? "mamba_n_groups" : "n_groups"));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t conv, fields_.Required(granite ? "mamba_d_conv" : "conv_kernel"));
    KVTIDE_RETURN_IF_ERROR(CheckDimensions({heads, dim, state, groups, conv}));
    return Recurrent((conv - 1) * (heads * dim + 2 * groups * state), state * heads * dim);
  }

  // LFM2: the last inputs of a short convolution.
  absl::StatusOr<LayerGeometry> ConvState() {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t columns, fields_.Required("conv_L_cache"));
    KVTIDE_RETURN_IF_ERROR(CheckDimensions({columns}));
    return Recurrent((columns - 1) * std::min<int64_t>(model_.n_embd, int64_t{1} << 24), 0);
  }

  static absl::Status CheckDimensions(const std::vector<int64_t>& fields) {
    for (int64_t field : fields) {
      if (field > kMaxDimension)
        return absl::InvalidArgumentError(
            absl::StrCat("a recurrent dimension of ", field, " is absurdly large"));
    }
    return absl::OkStatus();
  }

  absl::Status ShareLayers(const std::vector<std::string>& kinds) {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shared, fields_.Whole("num_kv_shared_layers", 0));
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
      KVTIDE_ASSIGN_OR_RETURN(const int64_t experts, fields_.Whole(field, 0));
      if (experts > 0) model_.n_experts = static_cast<int>(std::min<int64_t>(experts, 1 << 20));
    }
    for (const char* field : {"num_experts_per_tok", "num_experts_per_token", "top_k_experts"}) {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t used, fields_.Whole(field, 0));
      if (used > 0) model_.n_experts_used = static_cast<int>(std::min<int64_t>(used, 1 << 20));
    }
    KVTIDE_RETURN_IF_ERROR(ReadFeedForward());
    return absl::OkStatus();
  }

  absl::Status ReadFeedForward() {
    KVTIDE_ASSIGN_OR_RETURN(model_.n_ff, fields_.Whole("intermediate_size", 0));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t expert, fields_.Whole("moe_intermediate_size", 0));
    if (model_.n_experts == 0) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shared, fields_.Whole("n_shared_experts", 0));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shared_width, fields_.Whole("shared_expert_intermediate_size", 0));
    const int64_t width = expert > 0 ? expert : model_.n_ff;
    if (width > 1 << 24 || shared > 1 << 16 || shared_width > 1 << 24)
      return absl::InvalidArgumentError("field 'moe_intermediate_size' is absurdly large");
    model_.n_ff = width * (model_.n_experts_used + shared) + shared_width;
    return absl::OkStatus();
  }

  // Layers that predict further tokens. They keep a cache only while an engine speculates with them.
  absl::Status ReadExtraLayers() {
    KVTIDE_ASSIGN_OR_RETURN(const int modules, Dimension("num_mtp_modules", 0));
    KVTIDE_ASSIGN_OR_RETURN(const int per_module, Dimension("mtp_transformer_layers", 1));
    model_.mtp_layers = modules * std::min(per_module, 64);
    for (const char* field :
         {"num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "nextn_layers"}) {
      KVTIDE_ASSIGN_OR_RETURN(const int layers, Dimension(field, 0));
      if (layers > 0) model_.mtp_layers = layers;
    }
    if (model_.mtp_layers > 0) {
      Assume(absl::StrCat(model_.mtp_layers, model_.mtp_layers == 1 ? " layer" : " layers",
                          " for next-token prediction: without cache unless the engine speculates with it"));
    }
    return absl::OkStatus();
  }

  const ConfigObject& fields_;
  const Json& config_;
  const ReadOptions options_;
  ModelGeometry model_;
  std::string type_;
  int layers_ = 0;
  int kv_heads_ = 0;
  int head_dim_ = 0;
  int value_dim_ = 0;
  std::vector<int> block_kv_heads_;  // per layer, where layers differ
  std::vector<int> index_dims_;      // per layer
  int64_t window_ = 0;
  int64_t chunk_ = 0;
};

}  // namespace

absl::StatusOr<ModelGeometry> GeometryFromConfig(const ConfigObject& config, const std::string& name,
                                                 const ReadOptions& options) {
  return ConfigReader(config, options).Read(name);
}

absl::StatusOr<ModelGeometry> GeometryFromConfigJson(const std::string& text, const std::string& name,
                                                     const ReadOptions& options) {
  KVTIDE_ASSIGN_OR_RETURN(const ConfigObject config, ConfigObject::Parse(text));
  return GeometryFromConfig(config, name, options);
}

}  // namespace kvtide::planner
