#include "clients/engine/model_config.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numbers>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "planner/model/config_json.h"
#include "planner/model/config_object.h"

namespace kvtide::engine {
namespace {

using nlohmann::json;
using planner::ConfigObject;

// Sizes above this are damage, not models; it also keeps products of two of them far from overflow.
constexpr int64_t kLargestSize = 1 << 24;

absl::Status Unsupported(const std::string& what) {
  return absl::UnimplementedError(absl::StrCat(what, " is not supported by the reference engine"));
}

absl::StatusOr<int> Size(const char* what, int64_t value) {
  if (value < 1 || value > kLargestSize) {
    return absl::InvalidArgumentError(
        absl::StrCat("field '", what, "' is ", value, ", must be 1 .. ", kLargestSize));
  }
  return static_cast<int>(value);
}

bool IsGemma(const ModelConfig& model) {
  return model.architecture == "Gemma2ForCausalLM" || model.architecture == "Gemma3ForCausalLM";
}

absl::Status ReadArchitecture(const ConfigObject& config, ModelConfig* model) {
  model->architecture = config.Architecture();
  if (model->architecture.empty())
    return absl::InvalidArgumentError(
        "field 'architectures' is missing (for example [\"LlamaForCausalLM\"])");
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

// What the model keeps in its cache is read as the planner reads it; the engine computes with layers that
// differ in their windows at most.
absl::Status ReadShape(const ConfigObject& config, ModelConfig* model) {
  KVTIDE_ASSIGN_OR_RETURN(const planner::ModelGeometry geometry, planner::GeometryFromConfig(config, ""));
  if (geometry.n_experts > 0) return Unsupported("a mixture of experts");
  KVTIDE_ASSIGN_OR_RETURN(model->hidden_size, Size("hidden_size", geometry.n_embd));
  KVTIDE_ASSIGN_OR_RETURN(model->intermediate_size, Size("intermediate_size", geometry.n_ff));
  KVTIDE_ASSIGN_OR_RETURN(model->vocab_size, Size("vocab_size", geometry.n_vocab));
  KVTIDE_ASSIGN_OR_RETURN(model->max_positions, Size("max_position_embeddings",
                                                     geometry.max_context > 0 ? geometry.max_context : 2048));
  model->layers = static_cast<int>(geometry.layers.size());
  model->query_heads = geometry.n_query_heads;
  const planner::LayerGeometry& first = geometry.layers.front();
  model->kv_heads = first.n_kv_heads;
  model->head_dim = first.head_dim_k;
  for (const planner::LayerGeometry& layer : geometry.layers) {
    if (layer.kind != planner::LayerKind::kFull && layer.kind != planner::LayerKind::kSliding)
      return Unsupported(absl::StrCat("a layer that is ", planner::LayerKindName(layer.kind)));
    if (layer.n_kv_heads != model->kv_heads || layer.head_dim_k != model->head_dim ||
        layer.head_dim_v != model->head_dim || layer.index_dim != 0)
      return Unsupported("layers, or keys and values, of different widths");
    model->layer_windows.push_back(layer.window);
  }
  if (std::count(model->layer_windows.begin(), model->layer_windows.end(), first.window) == model->layers) {
    model->sliding_window = first.window;
    model->layer_windows.clear();
  }
  if (model->query_heads % model->kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(model->query_heads, " attention heads cannot share ", model->kv_heads, " KV heads"));
  }
  if (model->head_dim % 2 != 0) return Unsupported(absl::StrCat("the odd head_dim ", model->head_dim));
  return absl::OkStatus();
}

// YaRN (Peng et al. 2023, arXiv:2309.00071): frequencies that turn often stay, slow ones are stretched, and
// cos and sin grow.
absl::Status ReadYarn(const ConfigObject& rope, ModelConfig* model) {
  model->rope_scaling = RopeScaling::kYarn;
  for (const char* other : {"mscale", "mscale_all_dim"})
    if (rope.Has(other)) return Unsupported(absl::StrCat("yarn with ", other));
  KVTIDE_ASSIGN_OR_RETURN(const bool truncate, rope.Flag("truncate", true));
  if (!truncate) return Unsupported("yarn with truncate = false");
  KVTIDE_ASSIGN_OR_RETURN(model->rope_original_positions,
                          rope.Positive("original_max_position_embeddings", model->max_positions));
  KVTIDE_ASSIGN_OR_RETURN(model->yarn_beta_fast, rope.Positive("beta_fast", model->yarn_beta_fast));
  KVTIDE_ASSIGN_OR_RETURN(model->yarn_beta_slow, rope.Positive("beta_slow", model->yarn_beta_slow));
  KVTIDE_ASSIGN_OR_RETURN(
      model->rope_attention_factor,
      rope.Positive("attention_factor", model->rope_factor > 1 ? 0.1 * std::log(model->rope_factor) + 1 : 1));
  if (model->rope_theta <= 1 || model->yarn_beta_fast <= model->yarn_beta_slow)
    return absl::InvalidArgumentError("yarn: rope_theta must be above 1, and beta_fast above beta_slow");
  return absl::OkStatus();
}

absl::Status ReadScaling(const std::string& type, const ConfigObject& rope, ModelConfig* model) {
  if (type != "linear" && type != "llama3" && type != "yarn")
    return Unsupported(absl::StrCat("rope type ", type, " (supported: default, linear, llama3, yarn)"));
  if (!rope.Has("factor")) return absl::InvalidArgumentError("field 'factor' is missing");
  KVTIDE_ASSIGN_OR_RETURN(model->rope_factor, rope.Positive("factor", 1));
  if (type == "yarn") return ReadYarn(rope, model);
  model->rope_scaling = type == "linear" ? RopeScaling::kLinear : RopeScaling::kLlama3;
  if (model->rope_scaling == RopeScaling::kLinear) return absl::OkStatus();
  KVTIDE_ASSIGN_OR_RETURN(model->rope_low_frequency,
                          rope.Positive("low_freq_factor", model->rope_low_frequency));
  KVTIDE_ASSIGN_OR_RETURN(model->rope_high_frequency,
                          rope.Positive("high_freq_factor", model->rope_high_frequency));
  KVTIDE_ASSIGN_OR_RETURN(model->rope_original_positions,
                          rope.Positive("original_max_position_embeddings", 0));
  if (model->rope_original_positions <= 0)
    return absl::InvalidArgumentError("field 'original_max_position_embeddings' is missing");
  if (model->rope_high_frequency <= model->rope_low_frequency)
    return absl::InvalidArgumentError("high_freq_factor must exceed low_freq_factor");
  return absl::OkStatus();
}

// New folders have rope_parameters, older ones rope_theta and rope_scaling.
absl::Status ReadRope(const ConfigObject& config, ModelConfig* model) {
  if (model->architecture == "Gemma3ForCausalLM") {
    model->rope_theta = 1000000;
    KVTIDE_ASSIGN_OR_RETURN(model->local_rope_theta, config.Positive("rope_local_base_freq", 10000));
  }
  KVTIDE_ASSIGN_OR_RETURN(model->rope_theta, config.Positive("rope_theta", model->rope_theta));
  KVTIDE_ASSIGN_OR_RETURN(const double rotated, config.Positive("partial_rotary_factor", 1));
  if (rotated != 1) return Unsupported("partial_rotary_factor other than 1");
  const char* key = config.Has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  KVTIDE_ASSIGN_OR_RETURN(ConfigObject rope, config.Object(key));
  // Gemma 3 has one set for each kind of layer, in newer folders.
  if (rope.Has("full_attention")) {
    KVTIDE_ASSIGN_OR_RETURN(const ConfigObject local, rope.Object("sliding_attention"));
    KVTIDE_ASSIGN_OR_RETURN(model->local_rope_theta, local.Positive("rope_theta", model->local_rope_theta));
    KVTIDE_ASSIGN_OR_RETURN(rope, rope.Object("full_attention"));
  }
  KVTIDE_ASSIGN_OR_RETURN(model->rope_theta, rope.Positive("rope_theta", model->rope_theta));
  std::string type = "default";
  for (const char* type_key : {"type", "rope_type"}) {
    KVTIDE_ASSIGN_OR_RETURN(type, rope.Text(type_key, type));
  }
  if (type == "default") return absl::OkStatus();
  return Annotate(ReadScaling(type, rope, model), key);
}

absl::Status ReadGemma(const ConfigObject& config, ModelConfig* model) {
  const bool capped = model->architecture == "Gemma2ForCausalLM";
  model->embedding_scale = std::sqrt(static_cast<float>(model->hidden_size));
  KVTIDE_ASSIGN_OR_RETURN(const double scalar, config.Positive("query_pre_attn_scalar", 256));
  // Null means none here.
  const auto cap = [&](const char* field, double of_gemma2) {
    return config.Positive(field, capped && !config.json().contains(field) ? of_gemma2 : 0);
  };
  KVTIDE_ASSIGN_OR_RETURN(const double attention, cap("attn_logit_softcapping", 50));
  KVTIDE_ASSIGN_OR_RETURN(const double final, cap("final_logit_softcapping", 30));
  model->attention_scale = static_cast<float>(1 / std::sqrt(scalar));
  model->attention_softcap = static_cast<float>(attention);
  model->final_softcap = static_cast<float>(final);
  return absl::OkStatus();
}

absl::Status ReadTokenIds(const ConfigObject& config, ModelConfig* model) {
  const auto valid = [&](const json& id) {
    return id.is_number_integer() && id.get<int64_t>() >= 0 && id.get<int64_t>() < model->vocab_size;
  };
  const json& fields = config.json();
  if (config.Has("bos_token_id")) {
    if (!valid(fields["bos_token_id"]))
      return absl::InvalidArgumentError("field 'bos_token_id' is not in the vocabulary");
    model->bos_token = fields["bos_token_id"].get<int32_t>();
  }
  if (!config.Has("eos_token_id")) return absl::OkStatus();
  const json ids =
      fields["eos_token_id"].is_array() ? fields["eos_token_id"] : json::array({fields["eos_token_id"]});
  for (const json& id : ids) {
    if (!valid(id)) return absl::InvalidArgumentError("field 'eos_token_id' is not in the vocabulary");
    model->eos_tokens.push_back(id.get<int32_t>());
  }
  return absl::OkStatus();
}

absl::Status ReadBiasesAndActivation(const ConfigObject& config, ModelConfig* model) {
  KVTIDE_ASSIGN_OR_RETURN(const bool attention_bias, config.Flag("attention_bias", false));
  KVTIDE_ASSIGN_OR_RETURN(const bool mlp_bias, config.Flag("mlp_bias", false));
  if (mlp_bias) return Unsupported("mlp_bias");
  if (attention_bias) model->qkv_bias = model->output_bias = true;
  for (const char* key : {"hidden_act", "hidden_activation"}) {
    KVTIDE_ASSIGN_OR_RETURN(const std::string name, config.Text(key, ""));
    // Gemma's folders name the exact GELU in hidden_act and compute its approximation.
    if (name.empty() || (IsGemma(*model) && name == "gelu")) continue;
    if (name != (IsGemma(*model) ? "gelu_pytorch_tanh" : "silu"))
      return Unsupported(absl::StrCat(key, " \"", name, "\""));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelConfig> ReadFields(const ConfigObject& config) {
  ModelConfig model;
  KVTIDE_RETURN_IF_ERROR(ReadArchitecture(config, &model));
  KVTIDE_RETURN_IF_ERROR(ReadShape(config, &model));
  KVTIDE_ASSIGN_OR_RETURN(const double eps, config.Positive("rms_norm_eps", model.rms_norm_eps));
  model.rms_norm_eps = static_cast<float>(eps);
  KVTIDE_ASSIGN_OR_RETURN(model.tied_embeddings, config.Flag("tie_word_embeddings", model.tied_embeddings));
  KVTIDE_RETURN_IF_ERROR(ReadBiasesAndActivation(config, &model));
  if (IsGemma(model)) KVTIDE_RETURN_IF_ERROR(ReadGemma(config, &model));
  if (config.Has("quantization_config")) return Unsupported("quantization_config (quantised weights)");
  KVTIDE_RETURN_IF_ERROR(ReadRope(config, &model));
  KVTIDE_RETURN_IF_ERROR(ReadTokenIds(config, &model));
  return model;
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json_text) {
  KVTIDE_ASSIGN_OR_RETURN(const ConfigObject config, ConfigObject::Parse(std::string(json_text)));
  absl::StatusOr<ModelConfig> model = ReadFields(config);
  if (!model.ok()) return Annotate(model.status(), "config.json");
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
