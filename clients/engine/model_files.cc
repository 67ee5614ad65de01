#include "clients/engine/model_files.h"

#include <cmath>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::engine {
namespace {

using planner::GgufArray;
using planner::GgufFile;

// Reads metadata below "ARCHITECTURE."; the first error is kept.
class GgufKeys {
 public:
  GgufKeys(const GgufFile& file, std::string architecture)
      : file_(file), prefix_(std::move(architecture) + ".") {}

  int Size(const std::string& key, int64_t fallback) {
    const auto value = file_.Integer(prefix_ + key, fallback);
    if (!value.ok()) return Fail(value.status());
    if (*value < 1 || *value > (1 << 24)) {
      return Fail(absl::InvalidArgumentError(
          *value == 0 && !file_.Has(prefix_ + key)
              ? absl::StrCat("'", prefix_, key, "' is missing")
              : absl::StrCat("'", prefix_, key, "' is ", *value, ", must be 1 .. ", 1 << 24)));
    }
    return static_cast<int>(*value);
  }
  double Number(const std::string& key, double fallback) {
    const auto found = file_.metadata.find(prefix_ + key);
    if (found == file_.metadata.end()) return fallback;
    const double* value = std::get_if<double>(&found->second);
    if (value == nullptr || !std::isfinite(*value) || *value <= 0) {
      Fail(absl::InvalidArgumentError(absl::StrCat("'", prefix_, key, "' is not a positive number")));
      return fallback;
    }
    return *value;
  }
  std::string Text(const std::string& key) const {
    const auto found = file_.metadata.find(prefix_ + key);
    const std::string* value =
        found == file_.metadata.end() ? nullptr : std::get_if<std::string>(&found->second);
    return value == nullptr ? "" : *value;
  }
  bool Has(const std::string& key) const { return file_.Has(prefix_ + key); }
  int Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
    return 1;
  }
  const absl::Status& status() const { return status_; }

 private:
  const GgufFile& file_;
  const std::string prefix_;
  absl::Status status_;
};

const planner::GgufTensor* FindTensor(const GgufFile& file, std::string_view name) {
  for (const planner::GgufTensor& tensor : file.tensors)
    if (tensor.name == name) return &tensor;
  return nullptr;
}

// Layers of Gemma 2 and 3 by turns: every n-th sees all tokens.
std::vector<int> Windows(int layers, int window, int pattern) {
  std::vector<int> windows;
  for (int l = 0; l < layers; ++l) windows.push_back((l + 1) % pattern != 0 ? window : 0);
  return windows;
}

absl::Status ReadGemma(GgufKeys& keys, ModelConfig* model) {
  const bool third = model->architecture == "Gemma3ForCausalLM";
  model->activation = Activation::kGeluTanh;
  model->embedding_scale = std::sqrt(static_cast<float>(model->hidden_size));
  model->sandwich_norms = true;
  model->query_key_norm = third;
  model->layer_windows =
      Windows(model->layers, keys.Size("attention.sliding_window", third ? 1024 : 4096), third ? 6 : 2);
  if (third) model->local_rope_theta = keys.Number("rope.freq_base_swa", 10000);
  model->attention_softcap = third ? 0.0f : static_cast<float>(keys.Number("attn_logit_softcapping", 50));
  model->final_softcap = static_cast<float>(keys.Number("final_logit_softcapping", third ? 0 : 30));
  // The largest models divide by the width of a head that they would have without head_dim.
  if (model->layers == (third ? 62 : 46))
    model->attention_scale = 1 / std::sqrt(static_cast<float>(model->hidden_size / model->query_heads));
  return absl::OkStatus();
}

// The name in a GGUF file of a tensor of a Hugging Face folder; empty if there is none.
std::string GgufName(const std::string& name, bool sandwich_norms) {
  if (name == "model.embed_tokens.weight") return "token_embd.weight";
  if (name == "model.norm.weight") return "output_norm.weight";
  if (name == "lm_head.weight") return "output.weight";
  const std::string layers = "model.layers.";
  if (!absl::StartsWith(name, layers)) return "";
  const size_t dot = name.find('.', layers.size()), end = name.rfind('.');
  const std::string part = name.substr(dot + 1, end - dot - 1);
  static const std::map<std::string, std::string> kParts = {{"input_layernorm", "attn_norm"},
                                                            {"pre_feedforward_layernorm", "ffn_norm"},
                                                            {"post_feedforward_layernorm", "post_ffw_norm"},
                                                            {"self_attn.q_proj", "attn_q"},
                                                            {"self_attn.k_proj", "attn_k"},
                                                            {"self_attn.v_proj", "attn_v"},
                                                            {"self_attn.qkv_proj", "attn_qkv"},
                                                            {"self_attn.o_proj", "attn_output"},
                                                            {"self_attn.q_norm", "attn_q_norm"},
                                                            {"self_attn.k_norm", "attn_k_norm"},
                                                            {"mlp.gate_proj", "ffn_gate"},
                                                            {"mlp.up_proj", "ffn_up"},
                                                            {"mlp.gate_up_proj", "ffn_up"},
                                                            {"mlp.down_proj", "ffn_down"}};
  const auto found = kParts.find(part);
  const std::string gguf = part == "post_attention_layernorm"
                               ? (sandwich_norms ? "post_attention_norm" : "ffn_norm")
                           : found == kParts.end() ? ""
                                                   : found->second;
  if (gguf.empty()) return "";
  return absl::StrCat("blk.", name.substr(layers.size(), dot - layers.size()), ".", gguf, name.substr(end));
}

}  // namespace

bool IsGguf(const std::string& path) { return absl::EndsWith(absl::AsciiStrToLower(path), ".gguf"); }

absl::StatusOr<ModelConfig> ConfigOfGguf(const GgufFile& file) {
  const auto named = file.metadata.find("general.architecture");
  const std::string* architecture =
      named == file.metadata.end() ? nullptr : std::get_if<std::string>(&named->second);
  if (architecture == nullptr) return absl::InvalidArgumentError("'general.architecture' is missing");
  static const std::map<std::string, std::string> kArchitectures = {
      {"llama", "LlamaForCausalLM"},   {"qwen2", "Qwen2ForCausalLM"},   {"qwen3", "Qwen3ForCausalLM"},
      {"gemma2", "Gemma2ForCausalLM"}, {"gemma3", "Gemma3ForCausalLM"}, {"phi3", "Phi3ForCausalLM"}};
  const auto known = kArchitectures.find(*architecture);
  if (known == kArchitectures.end()) {
    return absl::UnimplementedError(absl::StrCat(
        "the architecture ", *architecture,
        " is not supported by the reference engine (llama, qwen2, qwen3, gemma2, gemma3 and phi3 are)"));
  }
  GgufKeys keys(file, *architecture);
  ModelConfig model;
  model.architecture = known->second;
  model.layers = keys.Size("block_count", 0);
  model.hidden_size = keys.Size("embedding_length", 0);
  model.intermediate_size = keys.Size("feed_forward_length", 0);
  model.query_heads = keys.Size("attention.head_count", 0);
  model.kv_heads = keys.Size("attention.head_count_kv", model.query_heads);
  model.head_dim = keys.Size("attention.key_length", model.hidden_size / model.query_heads);
  model.max_positions = keys.Size("context_length", 2048);
  model.rms_norm_eps = static_cast<float>(keys.Number("attention.layer_norm_rms_epsilon", 1e-6));
  model.rope_theta = keys.Number("rope.freq_base", 10000);
  if (keys.Size("rope.dimension_count", model.head_dim) != model.head_dim)
    keys.Fail(
        absl::UnimplementedError("rotation of a part of the head (rope.dimension_count) is not supported"));
  if (keys.Size("attention.value_length", model.head_dim) != model.head_dim)
    keys.Fail(absl::UnimplementedError("values of another width than keys are not supported"));
  if (keys.Has("expert_count") && keys.Size("expert_count", 0) > 0)
    keys.Fail(absl::UnimplementedError("mixtures of experts are not supported"));
  const std::string scaling = keys.Text("rope.scaling.type");
  if (scaling == "linear" || (scaling.empty() && keys.Has("rope.scaling.factor"))) {
    model.rope_scaling = RopeScaling::kLinear;
    model.rope_factor = keys.Number("rope.scaling.factor", 1);
  } else if (!scaling.empty() && scaling != "none") {
    keys.Fail(absl::UnimplementedError(absl::StrCat("rope scaling ", scaling, " is not supported")));
  }
  KVTIDE_RETURN_IF_ERROR(keys.status());
  if (model.query_heads % model.kv_heads != 0)
    return absl::InvalidArgumentError(
        absl::StrCat(model.query_heads, " attention heads cannot share ", model.kv_heads, " KV heads"));
  const planner::GgufTensor* embedding = FindTensor(file, "token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2 || embedding->shape[0] > (1 << 24))
    return absl::InvalidArgumentError("the tensor token_embd.weight is missing or no matrix");
  model.vocab_size = static_cast<int>(embedding->shape[0]);
  model.tied_embeddings = FindTensor(file, "output.weight") == nullptr;
  model.qkv_bias = FindTensor(file, "blk.0.attn_q.bias") != nullptr;
  model.output_bias = FindTensor(file, "blk.0.attn_output.bias") != nullptr;
  if (*architecture == "qwen3") model.query_key_norm = true;
  if (*architecture == "phi3") {
    if (FindTensor(file, "rope_factors_long.weight") != nullptr)
      return absl::UnimplementedError("Phi-3 with long RoPE factors is not supported");
    model.fused_projections = true;
    if (keys.Has("attention.sliding_window")) model.sliding_window = keys.Size("attention.sliding_window", 0);
  }
  if (absl::StartsWith(*architecture, "gemma")) KVTIDE_RETURN_IF_ERROR(ReadGemma(keys, &model));
  KVTIDE_RETURN_IF_ERROR(keys.status());
  KVTIDE_ASSIGN_OR_RETURN(const int64_t bos, file.Integer("tokenizer.ggml.bos_token_id", -1));
  if (bos >= 0 && bos < model.vocab_size) model.bos_token = static_cast<int32_t>(bos);
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    KVTIDE_ASSIGN_OR_RETURN(const int64_t eos, file.Integer(key, -1));
    if (eos >= 0 && eos < model.vocab_size) model.eos_tokens.push_back(static_cast<int32_t>(eos));
  }
  return model;
}

absl::Status ModelFiles::OpenGguf(const std::string& path) {
  KVTIDE_ASSIGN_OR_RETURN(const GgufFile file, planner::ReadGguf(path));
  KVTIDE_ASSIGN_OR_RETURN(config_, ConfigOfGguf(file));
  for (const std::string& part : file.paths) {
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> mapped, MappedFile::Open(part));
    files_.push_back(std::move(mapped));
  }
  std::map<std::string, WeightTensor> found;
  for (const planner::GgufTensor& tensor : file.tensors) {
    const std::span<const std::byte> data = files_[static_cast<size_t>(tensor.part)]->bytes();
    const int64_t begin = file.data_begin[static_cast<size_t>(tensor.part)] + tensor.offset,
                  size = static_cast<int64_t>(data.size());
    if (begin > size || tensor.bytes > size - begin) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name, " ends at byte ",
                                                     begin + tensor.bytes, ", the file holds ", size,
                                                     "; download it again"));
    }
    WeightTensor weight;
    weight.shape = tensor.shape;
    weight.bytes = data.subspan(static_cast<size_t>(begin), static_cast<size_t>(tensor.bytes));
    const GgufTypeInfo info = InfoOfGguf(tensor.type);
    weight.type_name = info.name != nullptr ? info.name : absl::StrCat("of ggml's type ", tensor.type);
    const auto type = static_cast<GgufType>(tensor.type);
    if (info.name != nullptr) {
      if (type == GgufType::kF32) {
        weight.type = DataType::kF32;
      } else if (type == GgufType::kF16) {
        weight.type = DataType::kF16;
      } else if (type == GgufType::kBf16) {
        weight.type = DataType::kBf16;
      } else {
        weight.coded = type;
      }
    }
    // Llama models are converted so that neighbouring rows turn together.
    if (config_.architecture == "LlamaForCausalLM") {
      if (absl::StrContains(tensor.name, ".attn_q.")) weight.paired_heads = config_.query_heads;
      if (absl::StrContains(tensor.name, ".attn_k.")) weight.paired_heads = config_.kv_heads;
    }
    found.emplace(tensor.name, std::move(weight));
  }
  if (const auto factors = found.find("rope_freqs.weight"); factors != found.end()) {
    const std::vector<int64_t> shape = {config_.head_dim / 2};
    KVTIDE_RETURN_IF_ERROR(CheckWeight(factors->second, path_, "rope_freqs.weight", shape));
    std::vector<float> values(static_cast<size_t>(config_.head_dim) / 2);
    factors->second.Row(0, values.data());
    config_.rope_divisors.assign(values.begin(), values.end());
  }
  tensors_ = std::move(found);
  return absl::OkStatus();
}

absl::StatusOr<ModelFiles> ModelFiles::Open(const std::string& path) {
  ModelFiles files;
  files.path_ = path;
  if (IsGguf(path)) {
    const absl::Status status = files.OpenGguf(path);
    if (!status.ok()) return absl::StrContains(status.message(), path) ? status : Annotate(status, path);
    return files;
  }
  KVTIDE_ASSIGN_OR_RETURN(files.config_, ReadModelConfig(path));
  KVTIDE_ASSIGN_OR_RETURN(files.folder_, SafetensorsFolder::Open(path));
  return files;
}

absl::StatusOr<WeightTensor> ModelFiles::Get(const std::string& name, std::span<const int64_t> shape) const {
  if (folder_.has_value()) return folder_->Get(name, shape);
  const std::string gguf = GgufName(name, config_.sandwich_norms);
  const auto found = tensors_.find(gguf);
  if (gguf.empty() || found == tensors_.end())
    return absl::NotFoundError(absl::StrCat(path_, " has no tensor ", gguf.empty() ? name : gguf));
  KVTIDE_RETURN_IF_ERROR(CheckWeight(found->second, path_, gguf, shape));
  return found->second;
}

size_t ModelFiles::bytes() const {
  size_t sum = 0;
  for (const auto& [name, tensor] : folder_.has_value() ? folder_->tensors() : tensors_)
    sum += tensor.bytes.size();
  return sum;
}

}  // namespace kvtide::engine
