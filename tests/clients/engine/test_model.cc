#include "tests/clients/engine/test_model.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>

#include "gtest/gtest.h"
#include "kernels/base/float16.h"
#include "nlohmann/json.hpp"

namespace kvtide::engine {
namespace {

using Matrix = std::vector<std::vector<double>>;  // rows of values

TestTensor RandomTensor(std::vector<int64_t> shape, double deviation, double mean, std::mt19937& random) {
  TestTensor tensor;
  tensor.shape = std::move(shape);
  size_t n = 1;
  for (const int64_t d : tensor.shape) n *= d;
  std::normal_distribution<double> normal(mean, deviation);
  for (size_t i = 0; i < n; ++i)
    tensor.values.push_back(Bf16ToF32(F32ToBf16(static_cast<float>(normal(random)))));
  return tensor;
}

Matrix Project(const Matrix& x, const TestTensors& weights, const std::string& name) {
  const TestTensor& w = weights.at(name + ".weight");
  const auto bias = weights.find(name + ".bias");
  Matrix y(x.size(), std::vector<double>(w.shape[0]));
  for (size_t t = 0; t < x.size(); ++t) {
    for (int64_t o = 0; o < w.shape[0]; ++o) {
      double sum = bias == weights.end() ? 0 : bias->second.values[o];
      for (int64_t i = 0; i < w.shape[1]; ++i) sum += x[t][i] * w.values[o * w.shape[1] + i];
      y[t][o] = sum;
    }
  }
  return y;
}

void Norm(double* x, const std::vector<float>& weight, double epsilon, double plus) {
  double squares = 0;
  for (size_t i = 0; i < weight.size(); ++i) squares += x[i] * x[i];
  const double factor = 1 / std::sqrt(squares / static_cast<double>(weight.size()) + epsilon);
  for (size_t i = 0; i < weight.size(); ++i) x[i] *= factor * (weight[i] + plus);
}

Matrix Normed(const ModelConfig& c, Matrix x, const std::vector<float>& weight) {
  for (auto& row : x) Norm(row.data(), weight, c.rms_norm_eps, c.norm_plus_one ? 1 : 0);
  return x;
}

void RotateHeads(const ModelConfig& c, const TestTensors& weights, const std::string& norm, int heads,
                 bool local, Matrix& x) {
  const std::vector<double> frequencies = RopeFrequencies(c, local);
  const int d = c.head_dim;
  for (size_t t = 0; t < x.size(); ++t) {
    for (int h = 0; h < heads; ++h) {
      double* v = x[t].data() + h * d;
      if (c.query_key_norm) Norm(v, weights.at(norm).values, c.rms_norm_eps, c.norm_plus_one ? 1 : 0);
      std::vector<double> turned(d);
      for (int i = 0; i < d; ++i) {
        const double angle = static_cast<double>(t) * frequencies[i % (d / 2)];
        const double partner = i < d / 2 ? -v[i + d / 2] : v[i - d / 2];
        turned[i] = v[i] * std::cos(angle) + partner * std::sin(angle);
      }
      std::copy(turned.begin(), turned.end(), v);
    }
  }
}

double Capped(double x, double cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }

// Rows [first, first + count) of a matrix of weights.
TestTensor Rows(const TestTensor& from, int64_t first, int64_t count) {
  TestTensor part;
  part.shape = {count, from.shape[1]};
  part.values.assign(from.values.begin() + first * from.shape[1],
                     from.values.begin() + (first + count) * from.shape[1]);
  return part;
}

// Projections that a file holds in one matrix, apart.
TestTensors Apart(const ModelConfig& c, TestTensors weights) {
  const int q = c.query_heads * c.head_dim, kv = c.kv_heads * c.head_dim, inner = c.intermediate_size;
  for (int l = 0; c.fused_projections && l < c.layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    const TestTensor &qkv = weights.at(p + "self_attn.qkv_proj.weight"),
                     &both = weights.at(p + "mlp.gate_up_proj.weight");
    weights[p + "self_attn.q_proj.weight"] = Rows(qkv, 0, q);
    weights[p + "self_attn.k_proj.weight"] = Rows(qkv, q, kv);
    weights[p + "self_attn.v_proj.weight"] = Rows(qkv, q + kv, kv);
    weights[p + "mlp.gate_proj.weight"] = Rows(both, 0, inner);
    weights[p + "mlp.up_proj.weight"] = Rows(both, inner, inner);
  }
  return weights;
}

Matrix Attention(const ModelConfig& c, size_t window, const Matrix& q, const Matrix& k, const Matrix& v) {
  const int d = c.head_dim;
  Matrix out(q.size(), std::vector<double>(q[0].size(), 0.0));
  for (size_t t = 0; t < q.size(); ++t) {
    const size_t first = window > 0 && t + 1 > window ? t + 1 - window : 0;
    for (int h = 0; h < c.query_heads; ++h) {
      const int kv = h / c.group();
      std::vector<double> weight(t + 1, 0.0);
      double total = 0;
      for (size_t s = first; s <= t; ++s) {
        double dot = 0;
        for (int i = 0; i < d; ++i) dot += q[t][h * d + i] * k[s][kv * d + i];
        dot *= c.attention_scale > 0 ? static_cast<double>(c.attention_scale)
                                     : 1 / std::sqrt(static_cast<double>(d));
        weight[s] = std::exp(Capped(dot, c.attention_softcap));
        total += weight[s];
      }
      for (size_t s = first; s <= t; ++s) {
        for (int i = 0; i < d; ++i) out[t][h * d + i] += weight[s] / total * v[s][kv * d + i];
      }
    }
  }
  return out;
}

}  // namespace

std::string MakeFolder(const std::string& name) {
  const std::filesystem::path path =
      std::filesystem::path(testing::TempDir()) / ("kvtide_engine_" + std::to_string(getpid()) + "_" + name);
  std::filesystem::remove_all(path);
  std::filesystem::create_directories(path);
  return path.string();
}

void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out << bytes;
}

std::string SafetensorsBytes(const TestTensors& tensors, const std::string& type) {
  nlohmann::json header;
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    for (const float value : tensor.values) {
      if (type == "F32") {
        data.append(reinterpret_cast<const char*>(&value), 4);
      } else {
        const uint16_t bits = type == "F16" ? F32ToF16(value) : F32ToBf16(value);
        data.append(reinterpret_cast<const char*>(&bits), 2);
      }
    }
    header[name] = {{"dtype", type}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  const std::string text = header.dump();
  std::string file;
  for (int i = 0; i < 8; ++i) file.push_back(static_cast<char>(text.size() >> (8 * i) & 0xff));
  return file + text + data;
}

TestTensors RandomWeights(const ModelConfig& c, uint32_t seed) {
  std::mt19937 random(seed);
  TestTensors weights;
  const auto matrix = [&](const std::string& name, int outputs, int inputs) {
    weights[name + ".weight"] = RandomTensor({outputs, inputs}, 1.5 / std::sqrt(inputs), 0, random);
  };
  const auto vector = [&](const std::string& name, int n, double mean) {
    weights[name] = RandomTensor({n}, 0.2, mean, random);
  };
  matrix("model.embed_tokens", c.vocab_size, c.hidden_size);
  if (!c.tied_embeddings) matrix("lm_head", c.vocab_size, c.hidden_size);
  const double one = c.norm_plus_one ? 0 : 1;
  vector("model.norm.weight", c.hidden_size, one);
  for (int l = 0; l < c.layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    vector(p + "input_layernorm.weight", c.hidden_size, one);
    vector(p + "post_attention_layernorm.weight", c.hidden_size, one);
    if (c.sandwich_norms) {
      vector(p + "pre_feedforward_layernorm.weight", c.hidden_size, one);
      vector(p + "post_feedforward_layernorm.weight", c.hidden_size, one);
    }
    const int q = c.query_heads * c.head_dim, kv = c.kv_heads * c.head_dim;
    if (c.fused_projections) {
      matrix(p + "self_attn.qkv_proj", q + 2 * kv, c.hidden_size);
      matrix(p + "mlp.gate_up_proj", 2 * c.intermediate_size, c.hidden_size);
    } else {
      matrix(p + "self_attn.q_proj", q, c.hidden_size);
      matrix(p + "self_attn.k_proj", kv, c.hidden_size);
      matrix(p + "self_attn.v_proj", kv, c.hidden_size);
      matrix(p + "mlp.gate_proj", c.intermediate_size, c.hidden_size);
      matrix(p + "mlp.up_proj", c.intermediate_size, c.hidden_size);
    }
    matrix(p + "self_attn.o_proj", c.hidden_size, q);
    matrix(p + "mlp.down_proj", c.hidden_size, c.intermediate_size);
    if (c.qkv_bias) {
      vector(p + "self_attn.q_proj.bias", c.query_heads * c.head_dim, 0);
      vector(p + "self_attn.k_proj.bias", c.kv_heads * c.head_dim, 0);
      vector(p + "self_attn.v_proj.bias", c.kv_heads * c.head_dim, 0);
    }
    if (c.output_bias) vector(p + "self_attn.o_proj.bias", c.hidden_size, 0);
    if (c.query_key_norm) {
      vector(p + "self_attn.q_norm.weight", c.head_dim, one);
      vector(p + "self_attn.k_norm.weight", c.head_dim, one);
    }
  }
  return weights;
}

std::vector<double> ReferenceLogits(const ModelConfig& c, const TestTensors& in_file,
                                    const std::vector<int32_t>& tokens) {
  const TestTensors weights = Apart(c, in_file);
  const TestTensor& embedding = weights.at("model.embed_tokens.weight");
  Matrix x;
  for (const int32_t token : tokens) {
    const float* row = embedding.values.data() + static_cast<size_t>(token) * c.hidden_size;
    x.emplace_back(row, row + c.hidden_size);
    for (double& value : x.back()) value *= static_cast<double>(c.embedding_scale);
  }
  const auto add = [&](const Matrix& y) {
    for (size_t t = 0; t < x.size(); ++t) {
      for (size_t i = 0; i < x[t].size(); ++i) x[t][i] += y[t][i];
    }
  };
  for (int l = 0; l < c.layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    Matrix h = Normed(c, x, weights.at(p + "input_layernorm.weight").values);
    Matrix q = Project(h, weights, p + "self_attn.q_proj"), k = Project(h, weights, p + "self_attn.k_proj");
    RotateHeads(c, weights, p + "self_attn.q_norm.weight", c.query_heads, c.window(l) > 0, q);
    RotateHeads(c, weights, p + "self_attn.k_norm.weight", c.kv_heads, c.window(l) > 0, k);
    const auto norm = [&](const char* name) { return weights.at(p + name + ".weight").values; };
    Matrix y = Project(
        Attention(c, static_cast<size_t>(c.window(l)), q, k, Project(h, weights, p + "self_attn.v_proj")),
        weights, p + "self_attn.o_proj");
    add(c.sandwich_norms ? Normed(c, y, norm("post_attention_layernorm")) : y);
    h = Normed(c, x, norm(c.sandwich_norms ? "pre_feedforward_layernorm" : "post_attention_layernorm"));
    Matrix gate = Project(h, weights, p + "mlp.gate_proj");
    const Matrix up = Project(h, weights, p + "mlp.up_proj");
    for (size_t t = 0; t < gate.size(); ++t) {
      for (size_t i = 0; i < gate[t].size(); ++i) {
        const double g = gate[t][i];
        const double gelu =
            0.5 * g * (1 + std::tanh(std::sqrt(2 / 3.14159265358979) * (g + 0.044715 * g * g * g)));
        gate[t][i] = up[t][i] * (c.activation == Activation::kGeluTanh ? gelu : g / (1 + std::exp(-g)));
      }
    }
    y = Project(gate, weights, p + "mlp.down_proj");
    add(c.sandwich_norms ? Normed(c, y, norm("post_feedforward_layernorm")) : y);
  }
  x = Normed(c, x, weights.at("model.norm.weight").values);
  std::vector<double> logits;
  for (const auto& row : Project(x, weights, c.tied_embeddings ? "model.embed_tokens" : "lm_head")) {
    for (const double logit : row) logits.push_back(Capped(logit, c.final_softcap));
  }
  return logits;
}

}  // namespace kvtide::engine
