#include "planner/model/gguf_geometry.h"

#include <algorithm>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxDim = 65536;
constexpr int64_t kMaxWidth = int64_t{1} << 31;

// Keys below "{arch}.attention." and "{arch}.ssm." that are understood or do not change the cache.
const std::set<std::string>& KnownKeys() {
  static const std::set<std::string> keys = {"attention.head_count",
                                             "attention.head_count_kv",
                                             "attention.key_length",
                                             "attention.value_length",
                                             "attention.key_length_swa",
                                             "attention.value_length_swa",
                                             "attention.key_length_mla",
                                             "attention.value_length_mla",
                                             "attention.kv_lora_rank",
                                             "attention.q_lora_rank",
                                             "attention.sliding_window",
                                             "attention.sliding_window_pattern",
                                             "attention.shared_kv_layers",
                                             "attention.layer_norm_rms_epsilon",
                                             "attention.layer_norm_epsilon",
                                             "attention.group_norm_epsilon",
                                             "attention.group_norm_groups",
                                             "attention.causal",
                                             "attention.scale",
                                             "attention.clamp_kqv",
                                             "attention.max_alibi_bias",
                                             "attention.output_scale",
                                             "attention.temperature_length",
                                             "attention.temperature_scale",
                                             "attention.chunk_size",
                                             "attention.gate_lora_rank",
                                             "attention.relative_buckets_count",
                                             "ssm.conv_kernel",
                                             "ssm.inner_size",
                                             "ssm.state_size",
                                             "ssm.time_step_rank",
                                             "ssm.group_count",
                                             "ssm.dt_b_c_rms"};
  return keys;
}

// Layers per period, the last of them full, for files without sliding_window_pattern.
struct DefaultPattern {
  const char* arch;
  int period;  // 0 = the loader ignores the window
};
constexpr DefaultPattern kDefaultPatterns[] = {
    {"gemma3", 6}, {"gemma2", 2},   {"llama4", 4}, {"cohere2", 4},  {"gpt-oss", 2}, {"llama", 0},
    {"qwen2", 0},  {"qwen2moe", 0}, {"qwen3", 0},  {"qwen3moe", 0}, {"phi3", 0},    {"starcoder2", 0}};

// Architectures whose cache the metadata alone does not tell.
struct RefusedArchitecture {
  const char* arch;
  const char* why;
};
constexpr RefusedArchitecture kRefused[] = {
    {"deepseek4",
     "its layers compress their cache in ways that the file does not say; plan --model DeepSeek-V4-Flash or "
     "DeepSeek-V4-Pro"},
    {"falcon-h1", "every layer keeps a cache and a state, which kvtide does not count yet"},
    {"glm5next", "how its pooled indexer keys are kept is not known"},
    {"inkling", "the histories of its short convolutions are not counted yet"}};

class GgufReader {
 public:
  GgufReader(const GgufFile& file, const ReadOptions& options) : file_(file), options_(options) {}

  absl::StatusOr<ModelGeometry> Read(const std::string& name) {
    auto it = file_.metadata.find("general.architecture");
    if (it == file_.metadata.end() || !std::holds_alternative<std::string>(it->second)) {
      return absl::InvalidArgumentError("metadata 'general.architecture' is missing");
    }
    arch_ = std::get<std::string>(it->second);
    for (const RefusedArchitecture& refused : kRefused) {
      if (arch_ == refused.arch)
        return absl::UnimplementedError(absl::StrCat("architecture '", arch_, "': ", refused.why));
    }
    model_.name = name;
    model_.source = absl::StrCat("gguf (", arch_.substr(0, 64), ")");
    model_.confidence = "high";
    KVTIDE_RETURN_IF_ERROR(CheckUnknown());
    KVTIDE_RETURN_IF_ERROR(ReadBasics());
    KVTIDE_RETURN_IF_ERROR(ReadWindows());
    KVTIDE_RETURN_IF_ERROR(ReadRecurrent());
    for (int i = 0; i < layers_; ++i) model_.layers.push_back(MakeLayer(i));
    KVTIDE_RETURN_IF_ERROR(ShareLayers());
    CountParameters();
    KVTIDE_RETURN_IF_ERROR(ValidateGeometry(model_));
    return model_;
  }

 private:
  std::string Key(const char* key) const { return absl::StrCat(arch_, ".", key); }

  absl::StatusOr<int64_t> Field(const char* key, int64_t fallback, int64_t limit) const {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t value, file_.Integer(Key(key), fallback));
    if (value < 0 || value > limit) {
      return absl::InvalidArgumentError(
          absl::StrCat("metadata '", Key(key), "' is ", value, ", expected 0 to ", limit));
    }
    return value;
  }

  absl::StatusOr<std::vector<int64_t>> PerLayer(const char* key) const {
    KVTIDE_ASSIGN_OR_RETURN(std::vector<int64_t> values,
                            file_.Integers(Key(key), static_cast<size_t>(layers_)));
    for (int64_t value : values) {
      if (value < 0 || value > kMaxDim) {
        return absl::InvalidArgumentError(absl::StrCat("metadata '", Key(key), "' has entry ", value));
      }
    }
    return values;
  }

  absl::Status CheckUnknown() {
    for (const auto& [key, value] : file_.metadata) {
      const bool relevant =
          absl::StartsWith(key, arch_ + ".attention.") || absl::StartsWith(key, arch_ + ".ssm.");
      if (!relevant || KnownKeys().count(key.substr(arch_.size() + 1)) > 0) continue;
      const std::string name = key.substr(0, 128);
      if (absl::StartsWith(key, arch_ + ".attention.indexer.")) {
        if (arch_ == "deepseek32") continue;  // counted
        // Other architectures pool keys or share them between layers.
        model_.uncounted.push_back(
            absl::StrCat("metadata '", name, "': the keys of the sparse-attention indexer"));
        continue;
      }
      if (!options_.ignore_unknown_fields) {
        return absl::InvalidArgumentError(
            absl::StrCat("unknown metadata '", name,
                         "' may change the cache; --ignore-unknown-fields goes on without it"));
      }
      model_.uncounted.push_back(absl::StrCat("metadata '", name, "' is unknown and was ignored"));
    }
    return absl::OkStatus();
  }

  absl::Status ReadBasics() {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t blocks, Field("block_count", 0, kMaxLayers));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t next, Field("nextn_predict_layers", 0, kMaxLayers));
    if (blocks < 1 || next >= blocks) {
      return absl::InvalidArgumentError(absl::StrCat("metadata '", Key("block_count"), "' is ", blocks,
                                                     " with ", next, " next-token layers"));
    }
    model_.mtp_layers = static_cast<int>(next);
    if (next > 0)
      model_.assumptions.push_back(
          absl::StrCat("the cache of ", next, " next-token prediction layers is not counted"));
    layers_ = static_cast<int>(blocks - next);
    KVTIDE_ASSIGN_OR_RETURN(model_.n_embd, Field("embedding_length", 0, kMaxWidth));
    KVTIDE_ASSIGN_OR_RETURN(model_.max_context, Field("context_length", 0, kMaxWidth));
    KVTIDE_ASSIGN_OR_RETURN(model_.n_vocab, Field("vocab_size", VocabularyLength(), kMaxWidth));
    KVTIDE_ASSIGN_OR_RETURN(heads_, PerLayer("attention.head_count"));
    KVTIDE_ASSIGN_OR_RETURN(wkv_head_, Field("wkv.head_size", 0, kMaxDim));
    if (heads_.empty() && wkv_head_ > 0)
      heads_.assign(static_cast<size_t>(layers_), 0);  // RWKV: no attention
    if (heads_.empty())
      return absl::InvalidArgumentError(
          absl::StrCat("metadata '", Key("attention.head_count"), "' is missing"));
    KVTIDE_ASSIGN_OR_RETURN(kv_heads_, PerLayer("attention.head_count_kv"));
    if (kv_heads_.empty()) kv_heads_ = heads_;
    const int64_t heads = *std::max_element(heads_.begin(), heads_.end());
    model_.n_query_heads = static_cast<int>(heads);
    const int64_t head_dim = heads > 0 ? model_.n_embd / heads : 0;
    KVTIDE_ASSIGN_OR_RETURN(key_, Field("attention.key_length", head_dim, kMaxDim));
    KVTIDE_ASSIGN_OR_RETURN(value_, Field("attention.value_length", head_dim, kMaxDim));
    KVTIDE_ASSIGN_OR_RETURN(key_swa_, Field("attention.key_length_swa", key_, kMaxDim));
    KVTIDE_ASSIGN_OR_RETURN(value_swa_, Field("attention.value_length_swa", value_, kMaxDim));
    KVTIDE_ASSIGN_OR_RETURN(latent_, Field("attention.kv_lora_rank", 0, kMaxDim));
    if (arch_ == "deepseek32") {  // one key per token in every layer, in the type of K
      KVTIDE_ASSIGN_OR_RETURN(index_, Field("attention.indexer.key_length", 0, kMaxDim));
      if (index_ == 0)
        return absl::InvalidArgumentError("metadata 'deepseek32.attention.indexer.key_length' is missing");
    }
    KVTIDE_ASSIGN_OR_RETURN(rope_, Field("rope.dimension_count", 0, kMaxDim));
    if (!file_.Has(Key("attention.key_length")) && latent_ == 0) {
      model_.assumptions.push_back(
          absl::StrCat("key_length is missing: embedding_length / heads = ", head_dim));
    }
    KVTIDE_ASSIGN_OR_RETURN(const int64_t experts, Field("expert_count", 0, 1 << 20));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t used, Field("expert_used_count", 0, 1 << 20));
    model_.n_experts = static_cast<int>(experts);
    model_.n_experts_used = static_cast<int>(used);
    return ReadFeedForward();
  }

  absl::Status ReadFeedForward() {
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<int64_t> widths, PerLayer("feed_forward_length"));
    if (!widths.empty()) model_.n_ff = *std::max_element(widths.begin(), widths.end());
    KVTIDE_ASSIGN_OR_RETURN(const int64_t expert, Field("expert_feed_forward_length", 0, 1 << 24));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shared, Field("expert_shared_count", 0, 1 << 16));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shared_width,
                            Field("expert_shared_feed_forward_length", 0, 1 << 24));
    if (model_.n_experts > 0) {
      const int64_t width = expert > 0 ? expert : model_.n_ff;
      model_.n_ff = width * model_.n_experts_used + (shared_width > 0 ? shared_width : width * shared);
    }
    return absl::OkStatus();
  }

  int64_t VocabularyLength() const {
    auto it = file_.metadata.find("tokenizer.ggml.tokens");
    if (it == file_.metadata.end()) return 0;
    const GgufArray* tokens = std::get_if<GgufArray>(&it->second);
    return tokens == nullptr ? 0 : static_cast<int64_t>(tokens->count);
  }

  // Fills windowed_ and window_.
  absl::Status ReadWindows() {
    windowed_.assign(static_cast<size_t>(layers_), false);
    KVTIDE_ASSIGN_OR_RETURN(window_, Field("attention.sliding_window", 0, INT32_MAX));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t chunk, Field("attention.chunk_size", 0, INT32_MAX));
    if (arch_ == "llama4" && window_ == 0) {
      window_ = chunk > 0 ? chunk : 8192;
      if (chunk == 0) model_.assumptions.push_back("llama4 without a chunk size: 8192");
    }
    if (window_ == 0) return absl::OkStatus();
    const std::string pattern = Key("attention.sliding_window_pattern");
    auto it = file_.metadata.find(pattern);
    if (it != file_.metadata.end() && std::holds_alternative<GgufArray>(it->second)) {
      KVTIDE_ASSIGN_OR_RETURN(const std::vector<int64_t> flags,
                              file_.Integers(pattern, static_cast<size_t>(layers_)));
      for (size_t i = 0; i < flags.size(); ++i) windowed_[i] = flags[i] != 0;
      return absl::OkStatus();
    }
    KVTIDE_ASSIGN_OR_RETURN(int64_t period, Field("attention.sliding_window_pattern", 0, kMaxLayers));
    if (it == file_.metadata.end()) {
      KVTIDE_ASSIGN_OR_RETURN(period, DefaultPeriod());
    }
    for (int i = 0; i < layers_ && period > 0; ++i)
      windowed_[static_cast<size_t>(i)] = i % period < period - 1;
    return absl::OkStatus();
  }

  absl::StatusOr<int64_t> DefaultPeriod() {
    for (const DefaultPattern& entry : kDefaultPatterns) {
      if (arch_ != entry.arch) continue;
      model_.assumptions.push_back(
          entry.period == 0
              ? absl::StrCat("the window of ", window_, " is ignored, as llama.cpp does for ", arch_)
              : absl::StrCat("no sliding_window_pattern: period ", entry.period, " as ", arch_, " has it"));
      return entry.period;
    }
    return absl::InvalidArgumentError(absl::StrCat("metadata '", Key("attention.sliding_window"), "' is ",
                                                   window_, " but '", Key("attention.sliding_window_pattern"),
                                                   "' is missing, and the default of architecture '",
                                                   arch_.substr(0, 64), "' is unknown"));
  }

  absl::Status ReadRecurrent() {
    recurrent_.assign(static_cast<size_t>(layers_), false);
    KVTIDE_ASSIGN_OR_RETURN(const int64_t conv, Field("ssm.conv_kernel", 0, kMaxDim));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t inner, Field("ssm.inner_size", 0, 1 << 22));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t state, Field("ssm.state_size", 0, kMaxDim));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t groups, Field("ssm.group_count", 0, kMaxDim));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t kda, Field("kda.head_dim", 0, kMaxDim));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shifts, Field("token_shift_count", 2, 16));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t short_conv, Field("shortconv.l_cache", 0, kMaxDim));
    if (inner == 0 && kda == 0 && wkv_head_ == 0 && short_conv == 0) return absl::OkStatus();
    if ((inner > 0 || kda > 0) && conv < 1)
      return absl::InvalidArgumentError(
          absl::StrCat("metadata '", Key("ssm.conv_kernel"), "' is missing or 0"));
    // As llama.cpp allocates them, f32: the last inputs of the convolutions, and the state proper.
    const int64_t kda_inner = model_.n_query_heads * kda;
    if (wkv_head_ > 0) {  // RWKV 6 and 7
      conv_bytes_ = 4 * shifts * model_.n_embd;
      state_bytes_ = conv_bytes_ + 4 * model_.n_embd * wkv_head_;
    } else if (short_conv > 0) {  // LFM2
      state_bytes_ = conv_bytes_ = 4 * model_.n_embd * (short_conv - 1);
    } else if (kda > 0) {  // Kimi delta attention
      conv_bytes_ = 4 * 3 * (conv - 1) * kda_inner;
      state_bytes_ = conv_bytes_ + 4 * kda * kda_inner;
    } else {
      conv_bytes_ = 4 * (conv - 1) * (inner + 2 * groups * state);
      state_bytes_ = conv_bytes_ + 4 * state * inner;
    }
    KVTIDE_ASSIGN_OR_RETURN(const int64_t interval, Field("full_attention_interval", 0, kMaxLayers));
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<int64_t> widths, PerLayer("feed_forward_length"));
    const bool by_heads =
        std::any_of(kv_heads_.begin(), kv_heads_.end(), [](int64_t heads) { return heads == 0; });
    if (interval == 0 && !by_heads) {
      model_.assumptions.push_back(
          "a recurrent model without full_attention_interval and without layers of 0 KV heads: all "
          "recurrent");
    }
    for (int i = 0; i < layers_; ++i) {
      const size_t l = static_cast<size_t>(i);
      recurrent_[l] = by_heads ? kv_heads_[l] == 0 : interval == 0 || (i + 1) % interval != 0;
      // Nemotron-H: layers of feed-forward alone have no KV heads either.
      if (absl::StartsWith(arch_, "nemotron_h") && l < widths.size() && widths[l] > 0) recurrent_[l] = false;
    }
    return absl::OkStatus();
  }

  LayerGeometry MakeLayer(int index) const {
    const size_t i = static_cast<size_t>(index);
    LayerGeometry layer;
    if (recurrent_[i]) {
      layer.kind = LayerKind::kRecurrent;
      layer.state_bytes = state_bytes_;
      layer.conv_bytes = conv_bytes_;
      return layer;
    }
    if (kv_heads_[i] == 0) {
      layer.kind = LayerKind::kNone;
      return layer;
    }
    if (latent_ > 0) {
      layer = LayerGeometry{LayerKind::kMla, 1, static_cast<int>(latent_ + rope_), 0};
      layer.index_dim = static_cast<int>(index_);
      return layer;
    }
    layer.n_kv_heads = static_cast<int>(kv_heads_[i]);
    layer.head_dim_k = static_cast<int>(windowed_[i] ? key_swa_ : key_);
    layer.head_dim_v = static_cast<int>(windowed_[i] ? value_swa_ : value_);
    if (windowed_[i]) {
      layer.kind = arch_ == "llama4" ? LayerKind::kChunked : LayerKind::kSliding;
      layer.window = static_cast<int>(window_);
    }
    return layer;
  }

  absl::Status ShareLayers() {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t shared, Field("attention.shared_kv_layers", 0, kMaxLayers));
    if (shared == 0) return absl::OkStatus();
    if (shared >= layers_) {
      return absl::InvalidArgumentError(absl::StrCat("metadata '", Key("attention.shared_kv_layers"), "' is ",
                                                     shared, " of ", layers_, " layers"));
    }
    const int owners = layers_ - static_cast<int>(shared);
    for (int i = owners; i < layers_; ++i) {
      int owner = owners - 1;
      while (owner >= 0 &&
             model_.layers[static_cast<size_t>(owner)].kind != model_.layers[static_cast<size_t>(i)].kind)
        --owner;
      if (owner < 0)
        return absl::InvalidArgumentError(
            absl::StrCat("layer ", i, " shares a cache that no earlier layer owns"));
      LayerGeometry layer;
      layer.kind = LayerKind::kShared;
      layer.shared_with = owner;
      model_.layers[static_cast<size_t>(i)] = layer;
    }
    return absl::OkStatus();
  }

  void CountParameters() {
    int64_t experts = 0;
    bool norm = false, bias = false;
    for (const GgufTensor& tensor : file_.tensors) {
      model_.params_total += tensor.elements;
      if (absl::StrContains(tensor.name, "_exps")) experts += tensor.elements;
      norm |= absl::EndsWith(tensor.name, ".attn_k_norm.weight");
      bias |= absl::EndsWith(tensor.name, ".attn_k.bias") || absl::EndsWith(tensor.name, ".attn_qkv.bias");
    }
    model_.params_experts = experts;
    if (!file_.tensors.empty())
      model_.key_traits = {norm ? Answer::kYes : Answer::kNo, bias ? Answer::kYes : Answer::kNo};
    if (experts > 0 && model_.n_experts > 0 && model_.n_experts_used > 0 &&
        model_.n_experts_used < model_.n_experts) {
      model_.params_active =
          model_.params_total - experts / model_.n_experts * (model_.n_experts - model_.n_experts_used);
    }
  }

  const GgufFile& file_;
  const ReadOptions options_;
  ModelGeometry model_;
  std::string arch_;
  int layers_ = 0;
  std::vector<int64_t> heads_, kv_heads_;
  int64_t key_ = 0, value_ = 0, key_swa_ = 0, value_swa_ = 0, latent_ = 0, rope_ = 0, window_ = 0,
          wkv_head_ = 0, state_bytes_ = 0, conv_bytes_ = 0, index_ = 0;
  std::vector<bool> windowed_, recurrent_;
};

}  // namespace

absl::StatusOr<ModelGeometry> GeometryFromGguf(const GgufFile& file, const std::string& name,
                                               const ReadOptions& options) {
  return GgufReader(file, options).Read(name);
}

int64_t GgufDeviceBytes(const GgufFile& file) {
  int64_t embedding = 0;
  bool output = false;
  for (const GgufTensor& tensor : file.tensors) {
    if (tensor.name == "token_embd.weight") embedding = tensor.bytes;
    output |= tensor.name == "output.weight";
  }
  return file.tensor_bytes - (output ? embedding : 0);
}

}  // namespace kvtide::planner
