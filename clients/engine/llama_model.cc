#include "clients/engine/llama_model.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "clients/engine/vector_math.h"
#include "kernels/base/status.h"

namespace kvtide::engine {
// cos and sin of every position of a chunk, times a factor: [tokens][head_dim / 2].
struct LlamaModel::Rotation {
  std::vector<float> cosine, sine;

  Rotation(const std::vector<double>& frequencies, double factor, int64_t start, int n_tokens) {
    cosine.resize(frequencies.size() * n_tokens);
    sine.resize(cosine.size());
    size_t at = 0;
    for (int t = 0; t < n_tokens; ++t) {
      for (const double frequency : frequencies) {
        const double angle = static_cast<double>(start + t) * frequency;
        cosine[at] = static_cast<float>(factor * std::cos(angle));
        sine[at++] = static_cast<float>(factor * std::sin(angle));
      }
    }
  }
};

// Reads tensors by their names in the file, and counts what it has read.
class LlamaModel::Loader {
 public:
  Loader(LlamaModel& model, const Progress& progress) : model_(model), progress_(progress) {
    total_bytes_ = model.files_.bytes();
  }

  absl::Status Matrix(const std::string& name, int outputs, int inputs, PackedMatrix* out) {
    KVTIDE_ASSIGN_OR_RETURN(const WeightTensor tensor, Tensor(name, {outputs, inputs}));
    *out = PackedMatrix(tensor);
    return absl::OkStatus();
  }

  absl::Status Vector(const std::string& name, int size, std::vector<float>* out) {
    KVTIDE_ASSIGN_OR_RETURN(WeightTensor tensor, Tensor(name, {size}));
    out->resize(static_cast<size_t>(size));
    if (tensor.paired_heads == 0) {
      tensor.Row(0, out->data());
    } else {
      tensor.shape = {size, 1};
      for (int i = 0; i < size; ++i) tensor.Row(i, out->data() + i);
    }
    return absl::OkStatus();
  }

  absl::Status Norm(const std::string& name, int size, std::vector<float>* out) {
    KVTIDE_RETURN_IF_ERROR(Vector(name, size, out));
    if (model_.config_.norm_plus_one)
      for (float& weight : *out) weight += 1;
    return absl::OkStatus();
  }

  absl::StatusOr<WeightTensor> Tensor(const std::string& name, const std::vector<int64_t>& shape) {
    KVTIDE_ASSIGN_OR_RETURN(WeightTensor tensor, model_.files_.Get(name, shape));
    int64_t values = 1;
    for (const int64_t n : shape) values *= n;
    model_.parameters_ += values;
    read_bytes_ += tensor.bytes.size();
    if (progress_) progress_(static_cast<double>(read_bytes_) / static_cast<double>(total_bytes_));
    return tensor;
  }

  absl::Status LoadLayer(int index, Layer* layer) {
    const ModelConfig& c = model_.config_;
    const std::string prefix = absl::StrCat("model.layers.", index, ".");
    const int q = c.query_heads * c.head_dim, kv = c.kv_heads * c.head_dim;
    const int width = c.hidden_size, inner = c.intermediate_size;
    KVTIDE_RETURN_IF_ERROR(Norm(prefix + "input_layernorm.weight", width, &layer->attention_norm));
    const std::string behind = prefix + "post_attention_layernorm.weight";
    if (c.sandwich_norms) {
      KVTIDE_RETURN_IF_ERROR(Norm(behind, width, &layer->after_attention));
      KVTIDE_RETURN_IF_ERROR(Norm(prefix + "pre_feedforward_layernorm.weight", width, &layer->mlp_norm));
      KVTIDE_RETURN_IF_ERROR(Norm(prefix + "post_feedforward_layernorm.weight", width, &layer->after_mlp));
    } else {
      KVTIDE_RETURN_IF_ERROR(Norm(behind, width, &layer->mlp_norm));
    }
    if (c.fused_projections) {
      KVTIDE_ASSIGN_OR_RETURN(const WeightTensor qkv,
                              Tensor(prefix + "self_attn.qkv_proj.weight", {q + 2 * kv, width}));
      layer->query = PackedMatrix(qkv.Rows(0, q));
      layer->key = PackedMatrix(qkv.Rows(q, kv));
      layer->value = PackedMatrix(qkv.Rows(q + kv, kv));
      KVTIDE_ASSIGN_OR_RETURN(const WeightTensor both,
                              Tensor(prefix + "mlp.gate_up_proj.weight", {2 * inner, width}));
      layer->gate = PackedMatrix(both.Rows(0, inner));
      layer->up = PackedMatrix(both.Rows(inner, inner));
    } else {
      KVTIDE_RETURN_IF_ERROR(Matrix(prefix + "self_attn.q_proj.weight", q, width, &layer->query));
      KVTIDE_RETURN_IF_ERROR(Matrix(prefix + "self_attn.k_proj.weight", kv, width, &layer->key));
      KVTIDE_RETURN_IF_ERROR(Matrix(prefix + "self_attn.v_proj.weight", kv, width, &layer->value));
      KVTIDE_RETURN_IF_ERROR(Matrix(prefix + "mlp.gate_proj.weight", inner, width, &layer->gate));
      KVTIDE_RETURN_IF_ERROR(Matrix(prefix + "mlp.up_proj.weight", inner, width, &layer->up));
    }
    KVTIDE_RETURN_IF_ERROR(Matrix(prefix + "self_attn.o_proj.weight", width, q, &layer->output));
    KVTIDE_RETURN_IF_ERROR(Matrix(prefix + "mlp.down_proj.weight", width, inner, &layer->down));
    if (c.qkv_bias) {
      KVTIDE_RETURN_IF_ERROR(Vector(prefix + "self_attn.q_proj.bias", q, &layer->query_bias));
      KVTIDE_RETURN_IF_ERROR(Vector(prefix + "self_attn.k_proj.bias", kv, &layer->key_bias));
      KVTIDE_RETURN_IF_ERROR(Vector(prefix + "self_attn.v_proj.bias", kv, &layer->value_bias));
    }
    if (c.output_bias)
      KVTIDE_RETURN_IF_ERROR(Vector(prefix + "self_attn.o_proj.bias", c.hidden_size, &layer->output_bias));
    if (c.query_key_norm) {
      KVTIDE_RETURN_IF_ERROR(Norm(prefix + "self_attn.q_norm.weight", c.head_dim, &layer->query_norm));
      KVTIDE_RETURN_IF_ERROR(Norm(prefix + "self_attn.k_norm.weight", c.head_dim, &layer->key_norm));
    }
    return absl::OkStatus();
  }

 private:
  LlamaModel& model_;
  const Progress& progress_;
  size_t total_bytes_ = 0;
  size_t read_bytes_ = 0;
};

LlamaModel::LlamaModel(ThreadPool& pool, ModelFiles files)
    : files_(std::move(files)),
      config_(files_.config()),
      pool_(pool),
      rope_frequencies_(RopeFrequencies(config_)),
      local_frequencies_(RopeFrequencies(config_, true)) {}

absl::StatusOr<std::unique_ptr<LlamaModel>> LlamaModel::Load(const std::string& path, ThreadPool& pool,
                                                             const Progress& progress) {
  KVTIDE_ASSIGN_OR_RETURN(ModelFiles files, ModelFiles::Open(path));
  std::unique_ptr<LlamaModel> model(new LlamaModel(pool, std::move(files)));
  const ModelConfig& c = model->config_;
  Loader loader(*model, progress);
  KVTIDE_ASSIGN_OR_RETURN(model->embedding_,
                          loader.Tensor("model.embed_tokens.weight", {c.vocab_size, c.hidden_size}));
  model->layers_.resize(c.layers);
  for (int i = 0; i < c.layers; ++i) KVTIDE_RETURN_IF_ERROR(loader.LoadLayer(i, &model->layers_[i]));
  KVTIDE_RETURN_IF_ERROR(loader.Norm("model.norm.weight", c.hidden_size, &model->final_norm_));
  // Folders with tied embeddings leave the head out.
  if (c.tied_embeddings) {
    model->head_ = PackedMatrix(model->embedding_);
  } else {
    KVTIDE_RETURN_IF_ERROR(loader.Matrix("lm_head.weight", c.vocab_size, c.hidden_size, &model->head_));
  }
  return model;
}

KvGeometry LlamaModel::kv_geometry() const {
  KvGeometry g{config_.layers, config_.query_heads, config_.kv_heads, config_.head_dim,
               config_.sliding_window};
  g.layer_windows = config_.layer_windows;
  g.attention_scale = config_.attention_scale;
  g.softcap = config_.attention_softcap;
  for (int l = 0; l < config_.layers; ++l) {
    const std::vector<double>& own =
        config_.window(l) > 0 && config_.local_rope_theta > 0 ? local_frequencies_ : rope_frequencies_;
    g.ropes.push_back({RopePairs::kHalves, {own.begin(), own.end()}});
  }
  return g;
}

void LlamaModel::Embed(std::span<const int32_t> tokens, float* x) const {
  const size_t width = config_.hidden_size;
  for (size_t t = 0; t < tokens.size(); ++t) {
    embedding_.Row(tokens[t], x + t * width);
    if (config_.embedding_scale != 1) Scale(x + t * width, width, config_.embedding_scale);
  }
}

void LlamaModel::NormRows(const float* x, int rows, const std::vector<float>& weight, float* out) const {
  const size_t width = weight.size();
  for (int r = 0; r < rows; ++r)
    RmsNorm(x + r * width, weight.data(), width, config_.rms_norm_eps, out + r * width);
}

// Channel i turns with channel i + head_dim / 2 (the half-split form of Hugging Face folders).
void LlamaModel::Rotate(const Rotation& rotation, int n_tokens, int heads, const std::vector<float>& norm,
                        float* x) const {
  const int half = config_.head_dim / 2;
  if (!norm.empty()) NormRows(x, n_tokens * heads, norm, x);
  pool_.ParallelFor((n_tokens + 63) / 64, [&](int64_t part) {
    for (int t = static_cast<int>(part) * 64; t < std::min<int>(n_tokens, static_cast<int>(part) * 64 + 64);
         ++t) {
      const float* cosine = &rotation.cosine[static_cast<size_t>(t) * half];
      const float* sine = &rotation.sine[static_cast<size_t>(t) * half];
      for (int h = 0; h < heads; ++h) {
        float* low = x + (static_cast<size_t>(t) * heads + h) * config_.head_dim;
        float* high = low + half;
        for (int i = 0; i < half; ++i) {
          const float a = low[i], b = high[i];
          low[i] = a * cosine[i] - b * sine[i];
          high[i] = b * cosine[i] + a * sine[i];
        }
      }
    }
  });
}

absl::Status LlamaModel::Forward(KvStore& store, SequenceId sequence, int64_t start,
                                 std::span<const int32_t> tokens, std::vector<float>* hidden) const {
  for (const int32_t token : tokens) {
    if (token < 0 || token >= config_.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", token, " is not in the vocabulary of ", config_.vocab_size));
    }
  }
  const int n = static_cast<int>(tokens.size());
  const size_t width = config_.hidden_size, inner = config_.intermediate_size;
  const size_t q_width = store.geometry().query_width(), kv_width = store.geometry().kv_width();
  const Rotation global(rope_frequencies_, config_.rope_attention_factor, start, n),
      local(local_frequencies_, config_.local_rope_theta > 0 ? 1.0 : config_.rope_attention_factor, start, n);
  std::vector<float> x(n * width), normed(n * width), q(n * q_width), attended(n * q_width);
  std::vector<float> k(n * kv_width), v(n * kv_width), gate(n * inner), up(n * inner);
  const auto bias = [](const std::vector<float>& b) { return b.empty() ? nullptr : b.data(); };
  Embed(tokens, x.data());
  store.NextTokens(sequence, start, tokens);
  for (int l = 0; l < config_.layers; ++l) {
    const Layer& layer = layers_[l];
    const Rotation& rotation = config_.window(l) > 0 ? local : global;
    NormRows(x.data(), n, layer.attention_norm, normed.data());
    layer.query.Multiply(pool_, normed.data(), n, bias(layer.query_bias), q.data());
    layer.key.Multiply(pool_, normed.data(), n, bias(layer.key_bias), k.data());
    layer.value.Multiply(pool_, normed.data(), n, bias(layer.value_bias), v.data());
    Rotate(rotation, n, config_.query_heads, layer.query_norm, q.data());
    Rotate(rotation, n, config_.kv_heads, layer.key_norm, k.data());
    KVTIDE_RETURN_IF_ERROR(
        store.AppendAttend(sequence, l, start, n, q.data(), k.data(), v.data(), attended.data()));
    layer.output.Multiply(pool_, attended.data(), n, bias(layer.output_bias), normed.data());
    if (config_.sandwich_norms) NormRows(normed.data(), n, layer.after_attention, normed.data());
    AddTo(x.data(), normed.data(), x.size());

    NormRows(x.data(), n, layer.mlp_norm, normed.data());
    layer.gate.Multiply(pool_, normed.data(), n, nullptr, gate.data());
    layer.up.Multiply(pool_, normed.data(), n, nullptr, up.data());
    pool_.ParallelFor((n + 63) / 64, [&](int64_t part) {
      const size_t from = part * 64 * inner, to = std::min<size_t>(gate.size(), from + 64 * inner);
      (config_.activation == Activation::kSilu ? SiluMultiply : GeluMultiply)(gate.data() + from,
                                                                              up.data() + from, to - from);
    });
    layer.down.Multiply(pool_, gate.data(), n, nullptr, normed.data());
    if (config_.sandwich_norms) NormRows(normed.data(), n, layer.after_mlp, normed.data());
    AddTo(x.data(), normed.data(), x.size());
  }
  hidden->resize(x.size());
  NormRows(x.data(), n, final_norm_, hidden->data());
  return absl::OkStatus();
}

void LlamaModel::Logits(const float* hidden, int rows, float* logits) const {
  head_.Multiply(pool_, hidden, rows, nullptr, logits);
  if (config_.final_softcap > 0)
    for (int r = 0; r < rows; ++r)
      SoftCap(logits + static_cast<size_t>(r) * config_.vocab_size, config_.vocab_size,
              config_.final_softcap);
}

}  // namespace kvtide::engine
