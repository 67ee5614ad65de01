#include "clients/engine/model_config.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numbers>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace kvtide::engine {
namespace {

using nlohmann::json;

// Sizes above this are damage, not models; it also keeps products of two of them far from overflow.
constexpr int64_t kLargestSize = 1 << 24;

bool IsSet(const json& config, const char* key) { return config.contains(key) && !config[key].is_null(); }

absl::Status Unsupported(const std::string& what) {
  return absl::UnimplementedError(
      absl::StrCat("config.json: ", what, " is not supported by the reference engine"));
}

// Reads an integer in [1, kLargestSize]. A missing key is an error unless `fallback` is positive.
absl::Status ReadSize(const json& config, const char* key, int64_t fallback, int* out) {
  int64_t value = fallback;
  if (IsSet(config, key)) {
    if (!config[key].is_number_integer())
      return absl::InvalidArgumentError(absl::StrCat("config.json: ", key, " is not an integer"));
    value = config[key].get<int64_t>();
  } else if (fallback <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("config.json: ", key, " is missing"));
  }
  if (value < 1 || value > kLargestSize) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.json: ", key, " is ", value, ", must be 1 .. ", kLargestSize));
  }
  *out = static_cast<int>(value);
  return absl::OkStatus();
}

absl::Status ReadNumber(const json& config, const char* key, double* out) {
  if (!IsSet(config, key)) return absl::OkStatus();
  if (!config[key].is_number() || !(config[key].get<double>() > 0) ||
      !std::isfinite(config[key].get<double>())) {
    return absl::InvalidArgumentError(absl::StrCat("config.json: ", key, " is not a positive number"));
  }
  *out = config[key].get<double>();
  return absl::OkStatus();
}

absl::Status ReadFlag(const json& config, const char* key, bool* out) {
  if (!IsSet(config, key)) return absl::OkStatus();
  if (!config[key].is_boolean())
    return absl::InvalidArgumentError(absl::StrCat("config.json: ", key, " is not true or false"));
  *out = config[key].get<bool>();
  return absl::OkStatus();
}

bool IsGemma(const ModelConfig& model) {
  return model.architecture == "Gemma2ForCausalLM" || model.architecture == "Gemma3ForCausalLM";
}

absl::Status ReadArchitecture(const json& config, ModelConfig* model) {
  if (IsSet(config, "architectures") && config["architectures"].is_array() &&
      !config["architectures"].empty() && config["architectures"][0].is_string()) {
    model->architecture = config["architectures"][0].get<std::string>();
  } else {
    return absl::InvalidArgumentError(
        "config.json: architectures is missing (for example [\"LlamaForCausalLM\"])");
  }
  if (model->architecture == "Qwen2ForCausalLM") {
    model->qkv_bias = true;
  } else if (model->architecture == "Qwen3ForCausalLM") {
    model->query_key_norm = true;
  } else if (model->architecture == "Phi3ForCausalLM") {
    model->fused_projections = true;
  } else if (IsGemma(*model)) {
    model->query_key_norm = model->architecture == "Gemma3ForCausalLM";
    model->activation = Activation::kGeluTanh;
    model->norm_plus_one = model->sandwich_norms = model->tied_embeddings = true;
  } else if (model->architecture != "LlamaForCausalLM" && model->architecture != "MistralForCausalLM") {
    return Unsupported(
        absl::StrCat("the architecture ", model->architecture,
                     " (supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
                     "Qwen3ForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, Phi3ForCausalLM)"));
  }
  return absl::OkStatus();
}

// YaRN (Peng et al. 2023, arXiv:2309.00071): frequencies that turn often stay, slow ones are stretched, and
// cos and sin grow.
absl::Status ReadYarn(const json& rope, ModelConfig* model) {
  model->rope_scaling = RopeScaling::kYarn;
  for (const char* other : {"mscale", "mscale_all_dim"})
    if (IsSet(rope, other)) return Unsupported(absl::StrCat("yarn with ", other));
  if (IsSet(rope, "truncate") && rope["truncate"].is_boolean() && !rope["truncate"].get<bool>())
    return Unsupported("yarn with truncate = false");
  model->rope_original_positions = model->max_positions;
  KVTIDE_RETURN_IF_ERROR(
      ReadNumber(rope, "original_max_position_embeddings", &model->rope_original_positions));
  KVTIDE_RETURN_IF_ERROR(ReadNumber(rope, "beta_fast", &model->yarn_beta_fast));
  KVTIDE_RETURN_IF_ERROR(ReadNumber(rope, "beta_slow", &model->yarn_beta_slow));
  model->rope_attention_factor = model->rope_factor > 1 ? 0.1 * std::log(model->rope_factor) + 1 : 1;
  KVTIDE_RETURN_IF_ERROR(ReadNumber(rope, "attention_factor", &model->rope_attention_factor));
  if (model->rope_theta <= 1 || model->yarn_beta_fast <= model->yarn_beta_slow)
    return absl::InvalidArgumentError("yarn: rope_theta must be above 1, and beta_fast above beta_slow");
  return absl::OkStatus();
}

// New folders have rope_parameters, older ones rope_theta and rope_scaling.
absl::Status ReadRope(const json& config, ModelConfig* model) {
  if (model->architecture == "Gemma3ForCausalLM") {
    model->rope_theta = 1000000;
    model->local_rope_theta = 10000;
    KVTIDE_RETURN_IF_ERROR(ReadNumber(config, "rope_local_base_freq", &model->local_rope_theta));
  }
  KVTIDE_RETURN_IF_ERROR(ReadNumber(config, "rope_theta", &model->rope_theta));
  if (IsSet(config, "partial_rotary_factor") && config["partial_rotary_factor"] != 1.0) {
    return Unsupported("partial_rotary_factor other than 1");
  }
  const char* key = IsSet(config, "rope_parameters") ? "rope_parameters" : "rope_scaling";
  if (!IsSet(config, key)) return absl::OkStatus();
  if (!config[key].is_object())
    return absl::InvalidArgumentError(absl::StrCat("config.json: ", key, " is not an object"));
  // Gemma 3 has one set for each kind of layer, in newer folders.
  const bool by_kind = IsSet(config[key], "full_attention") && config[key]["full_attention"].is_object();
  if (by_kind && IsSet(config[key], "sliding_attention") && config[key]["sliding_attention"].is_object())
    KVTIDE_RETURN_IF_ERROR(
        ReadNumber(config[key]["sliding_attention"], "rope_theta", &model->local_rope_theta));
  const json& rope = by_kind ? config[key]["full_attention"] : config[key];
  KVTIDE_RETURN_IF_ERROR(ReadNumber(rope, "rope_theta", &model->rope_theta));
  std::string type = "default";
  for (const char* type_key : {"type", "rope_type"}) {
    if (!IsSet(rope, type_key)) continue;
    if (!rope[type_key].is_string())
      return absl::InvalidArgumentError(absl::StrCat("config.json: ", key, ".", type_key, " is not a text"));
    type = rope[type_key].get<std::string>();
  }
  if (type == "default") return absl::OkStatus();
  if (type != "linear" && type != "llama3" && type != "yarn")
    return Unsupported(absl::StrCat("rope type ", type, " (supported: default, linear, llama3, yarn)"));
  if (!IsSet(rope, "factor"))
    return absl::InvalidArgumentError(absl::StrCat("config.json: ", key, ".factor is missing"));
  KVTIDE_RETURN_IF_ERROR(ReadNumber(rope, "factor", &model->rope_factor));
  if (type == "yarn") return ReadYarn(rope, model);
  model->rope_scaling = type == "linear" ? RopeScaling::kLinear : RopeScaling::kLlama3;
  if (model->rope_scaling == RopeScaling::kLinear) return absl::OkStatus();
  KVTIDE_RETURN_IF_ERROR(ReadNumber(rope, "low_freq_factor", &model->rope_low_frequency));
  KVTIDE_RETURN_IF_ERROR(ReadNumber(rope, "high_freq_factor", &model->rope_high_frequency));
  KVTIDE_RETURN_IF_ERROR(
      ReadNumber(rope, "original_max_position_embeddings", &model->rope_original_positions));
  if (model->rope_original_positions <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.json: ", key, ".original_max_position_embeddings is missing"));
  }
  if (model->rope_high_frequency <= model->rope_low_frequency) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.json: ", key, ": high_freq_factor must exceed low_freq_factor"));
  }
  return absl::OkStatus();
}

absl::Status ReadWindow(const json& config, ModelConfig* model) {
  bool use_sliding_window =
      model->architecture != "Qwen2ForCausalLM" && model->architecture != "Qwen3ForCausalLM";
  KVTIDE_RETURN_IF_ERROR(ReadFlag(config, "use_sliding_window", &use_sliding_window));
  if (IsSet(config, "layer_types")) {
    if (!config["layer_types"].is_array())
      return absl::InvalidArgumentError("config.json: layer_types is not a list");
    int window = 0;
    for (const json& type : config["layer_types"]) {
      if (type != "full_attention" && type != "sliding_attention")
        return Unsupported(absl::StrCat("layer_types with ", type.dump()));
      if (type == "sliding_attention" && window == 0)
        KVTIDE_RETURN_IF_ERROR(ReadSize(config, "sliding_window", IsGemma(*model) ? 4096 : 0, &window));
      model->layer_windows.push_back(type == "sliding_attention" ? window : 0);
    }
    if (model->layer_windows.size() != static_cast<size_t>(model->layers))
      return absl::InvalidArgumentError(absl::StrCat("config.json: layer_types has ",
                                                     model->layer_windows.size(), " entries for ",
                                                     model->layers, " layers"));
    return absl::OkStatus();
  }
  if (IsGemma(*model)) {
    int window = 4096, pattern = model->architecture == "Gemma3ForCausalLM" ? 6 : 2;
    KVTIDE_RETURN_IF_ERROR(ReadSize(config, "sliding_window", window, &window));
    KVTIDE_RETURN_IF_ERROR(ReadSize(config, "sliding_window_pattern", pattern, &pattern));
    for (int l = 0; l < model->layers; ++l)
      model->layer_windows.push_back((l + 1) % pattern != 0 ? window : 0);
    return absl::OkStatus();
  }
  if (!use_sliding_window || !IsSet(config, "sliding_window")) return absl::OkStatus();
  if (IsSet(config, "max_window_layers") && config["max_window_layers"] != model->layers) {
    return Unsupported("sliding_window on a part of the layers (max_window_layers)");
  }
  return ReadSize(config, "sliding_window", 0, &model->sliding_window);
}

absl::Status ReadGemma(const json& config, ModelConfig* model) {
  model->embedding_scale = std::sqrt(static_cast<float>(model->hidden_size));
  double scalar = 256, attention = 0, final = 0;
  if (model->architecture == "Gemma2ForCausalLM") attention = 50, final = 30;
  if (config.contains("attn_logit_softcapping")) attention = 0;
  if (config.contains("final_logit_softcapping")) final = 0;
  KVTIDE_RETURN_IF_ERROR(ReadNumber(config, "query_pre_attn_scalar", &scalar));
  KVTIDE_RETURN_IF_ERROR(ReadNumber(config, "attn_logit_softcapping", &attention));
  KVTIDE_RETURN_IF_ERROR(ReadNumber(config, "final_logit_softcapping", &final));
  model->attention_scale = static_cast<float>(1 / std::sqrt(scalar));
  model->attention_softcap = static_cast<float>(attention);
  model->final_softcap = static_cast<float>(final);
  return absl::OkStatus();
}

absl::Status ReadTokenIds(const json& config, ModelConfig* model) {
  const auto valid = [&](const json& id) {
    return id.is_number_integer() && id.get<int64_t>() >= 0 && id.get<int64_t>() < model->vocab_size;
  };
  if (IsSet(config, "bos_token_id")) {
    if (!valid(config["bos_token_id"]))
      return absl::InvalidArgumentError("config.json: bos_token_id is not in the vocabulary");
    model->bos_token = config["bos_token_id"].get<int32_t>();
  }
  if (!IsSet(config, "eos_token_id")) return absl::OkStatus();
  const json ids =
      config["eos_token_id"].is_array() ? config["eos_token_id"] : json::array({config["eos_token_id"]});
  for (const json& id : ids) {
    if (!valid(id)) return absl::InvalidArgumentError("config.json: eos_token_id is not in the vocabulary");
    model->eos_tokens.push_back(id.get<int32_t>());
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json_text) {
  const json config = json::parse(json_text.begin(), json_text.end(), nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return absl::InvalidArgumentError("config.json is not a JSON object");
  ModelConfig model;
  KVTIDE_RETURN_IF_ERROR(ReadArchitecture(config, &model));
  KVTIDE_RETURN_IF_ERROR(ReadSize(config, "hidden_size", 0, &model.hidden_size));
  KVTIDE_RETURN_IF_ERROR(ReadSize(config, "intermediate_size", 0, &model.intermediate_size));
  KVTIDE_RETURN_IF_ERROR(ReadSize(config, "num_hidden_layers", 0, &model.layers));
  KVTIDE_RETURN_IF_ERROR(ReadSize(config, "num_attention_heads", 0, &model.query_heads));
  KVTIDE_RETURN_IF_ERROR(ReadSize(config, "num_key_value_heads", model.query_heads, &model.kv_heads));
  KVTIDE_RETURN_IF_ERROR(ReadSize(
      config, "head_dim", IsGemma(model) ? 256 : model.hidden_size / model.query_heads, &model.head_dim));
  KVTIDE_RETURN_IF_ERROR(ReadSize(config, "vocab_size", 0, &model.vocab_size));
  KVTIDE_RETURN_IF_ERROR(ReadSize(config, "max_position_embeddings", 2048, &model.max_positions));
  if (model.query_heads % model.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "config.json: ", model.query_heads, " attention heads cannot share ", model.kv_heads, " KV heads"));
  }
  if (model.head_dim % 2 != 0) return Unsupported(absl::StrCat("the odd head_dim ", model.head_dim));
  double eps = model.rms_norm_eps;
  KVTIDE_RETURN_IF_ERROR(ReadNumber(config, "rms_norm_eps", &eps));
  model.rms_norm_eps = static_cast<float>(eps);
  KVTIDE_RETURN_IF_ERROR(ReadFlag(config, "tie_word_embeddings", &model.tied_embeddings));
  bool attention_bias = false, mlp_bias = false;
  KVTIDE_RETURN_IF_ERROR(ReadFlag(config, "attention_bias", &attention_bias));
  KVTIDE_RETURN_IF_ERROR(ReadFlag(config, "mlp_bias", &mlp_bias));
  if (mlp_bias) return Unsupported("mlp_bias");
  if (attention_bias) model.qkv_bias = model.output_bias = true;
  for (const char* key : {"hidden_act", "hidden_activation"}) {
    // Gemma's folders name the exact GELU in hidden_act and compute its approximation.
    if (!IsSet(config, key) || (IsGemma(model) && config[key] == "gelu")) continue;
    if (config[key] != (IsGemma(model) ? "gelu_pytorch_tanh" : "silu"))
      return Unsupported(absl::StrCat(key, " ", config[key].dump()));
  }
  if (IsGemma(model)) KVTIDE_RETURN_IF_ERROR(ReadGemma(config, &model));
  if (IsSet(config, "quantization_config")) return Unsupported("quantization_config (quantised weights)");
  KVTIDE_RETURN_IF_ERROR(ReadRope(config, &model));
  KVTIDE_RETURN_IF_ERROR(ReadWindow(config, &model));
  KVTIDE_RETURN_IF_ERROR(ReadTokenIds(config, &model));
  return model;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/config.json");
  std::ifstream in(path, std::ios::binary);
  if (!in)
    return absl::NotFoundError(
        absl::StrCat("cannot open ", path, " (a Hugging Face model folder is expected)"));
  std::ostringstream text;
  text << in.rdbuf();
  absl::StatusOr<ModelConfig> model = ParseModelConfig(text.str());
  if (!model.ok()) return Annotate(model.status(), folder);
  return model;
}

std::vector<double> RopeFrequencies(const ModelConfig& config, bool local) {
  local = local && config.local_rope_theta > 0;
  // Pairs of channels between which YaRN goes from unchanged to stretched: those that turn so often in the
  // original context.
  const auto pair_of_turns = [&config](double turns) {
    return config.head_dim * std::log(config.rope_original_positions / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(config.rope_theta));
  };
  double yarn_low = 0, yarn_high = 0;
  if (config.rope_scaling == RopeScaling::kYarn) {
    yarn_low = std::max(0.0, std::floor(pair_of_turns(config.yarn_beta_fast)));
    yarn_high = std::min(config.head_dim - 1.0, std::ceil(pair_of_turns(config.yarn_beta_slow)));
    if (yarn_high == yarn_low) yarn_high += 0.001;
  }
  std::vector<double> frequencies(config.head_dim / 2);
  for (int i = 0; i < config.head_dim / 2; ++i) {
    double frequency =
        std::pow(local ? config.local_rope_theta : config.rope_theta, -2.0 * i / config.head_dim);
    if (!local && !config.rope_divisors.empty()) frequency /= config.rope_divisors[static_cast<size_t>(i)];
    if (local) {  // as it is
    } else if (config.rope_scaling == RopeScaling::kLinear) {
      frequency /= config.rope_factor;
    } else if (config.rope_scaling == RopeScaling::kYarn) {
      const double stretched = std::clamp((i - yarn_low) / (yarn_high - yarn_low), 0.0, 1.0);
      frequency = stretched * frequency / config.rope_factor + (1 - stretched) * frequency;
    } else if (config.rope_scaling == RopeScaling::kLlama3) {
      // Waves shorter than original/high stay, longer than original/low are stretched, between them a blend.
      const double turns = config.rope_original_positions * frequency / (2 * std::numbers::pi);
      if (turns < config.rope_low_frequency) {
        frequency /= config.rope_factor;
      } else if (turns <= config.rope_high_frequency) {
        const double smooth =
            (turns - config.rope_low_frequency) / (config.rope_high_frequency - config.rope_low_frequency);
        frequency = (1 - smooth) * frequency / config.rope_factor + smooth * frequency;
      }
    }
    frequencies[i] = frequency;
  }
  return frequencies;
}

}  // namespace kvtide::engine
