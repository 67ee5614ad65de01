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

void Norm(double* x, const std::vector<float>& weight, double epsilon) {
  double squares = 0;
  for (size_t i = 0; i < weight.size(); ++i) squares += x[i] * x[i];
  const double factor = 1 / std::sqrt(squares / static_cast<double>(weight.size()) + epsilon);
  for (size_t i = 0; i < weight.size(); ++i) x[i] *= factor * weight[i];
}

Matrix Normed(Matrix x, const std::vector<float>& weight, double epsilon) {
  for (auto& row : x) Norm(row.data(), weight, epsilon);
  return x;
}

void RotateHeads(const ModelConfig& c, const TestTensors& weights, const std::string& norm, int heads,
                 Matrix& x) {
  const std::vector<double> frequencies = RopeFrequencies(c);
  const int d = c.head_dim;
  for (size_t t = 0; t < x.size(); ++t) {
    for (int h = 0; h < heads; ++h) {
      double* v = x[t].data() + h * d;
      if (c.query_key_norm) Norm(v, weights.at(norm).values, c.rms_norm_eps);
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

Matrix Attention(const ModelConfig& c, const Matrix& q, const Matrix& k, const Matrix& v) {
  const int d = c.head_dim;
  Matrix out(q.size(), std::vector<double>(q[0].size(), 0.0));
  for (size_t t = 0; t < q.size(); ++t) {
    const size_t first =
        c.sliding_window > 0 && t + 1 > static_cast<size_t>(c.sliding_window) ? t + 1 - c.sliding_window : 0;
    for (int h = 0; h < c.query_heads; ++h) {
      const int kv = h / c.group();
      std::vector<double> weight(t + 1, 0.0);
      double total = 0;
      for (size_t s = first; s <= t; ++s) {
        double dot = 0;
        for (int i = 0; i < d; ++i) dot += q[t][h * d + i] * k[s][kv * d + i];
        weight[s] = std::exp(dot / std::sqrt(static_cast<double>(d)));
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
  vector("model.norm.weight", c.hidden_size, 1);
  for (int l = 0; l < c.layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    vector(p + "input_layernorm.weight", c.hidden_size, 1);
    vector(p + "post_attention_layernorm.weight", c.hidden_size, 1);
    matrix(p + "self_attn.q_proj", c.query_heads * c.head_dim, c.hidden_size);
    matrix(p + "self_attn.k_proj", c.kv_heads * c.head_dim, c.hidden_size);
    matrix(p + "self_attn.v_proj", c.kv_heads * c.head_dim, c.hidden_size);
    matrix(p + "self_attn.o_proj", c.hidden_size, c.query_heads * c.head_dim);
    matrix(p + "mlp.gate_proj", c.intermediate_size, c.hidden_size);
    matrix(p + "mlp.up_proj", c.intermediate_size, c.hidden_size);
    matrix(p + "mlp.down_proj", c.hidden_size, c.intermediate_size);
    if (c.qkv_bias) {
      vector(p + "self_attn.q_proj.bias", c.query_heads * c.head_dim, 0);
      vector(p + "self_attn.k_proj.bias", c.kv_heads * c.head_dim, 0);
      vector(p + "self_attn.v_proj.bias", c.kv_heads * c.head_dim, 0);
    }
    if (c.output_bias) vector(p + "self_attn.o_proj.bias", c.hidden_size, 0);
    if (c.query_key_norm) {
      vector(p + "self_attn.q_norm.weight", c.head_dim, 1);
      vector(p + "self_attn.k_norm.weight", c.head_dim, 1);
    }
  }
  return weights;
}

std::vector<double> ReferenceLogits(const ModelConfig& c, const TestTensors& weights,
                                    const std::vector<int32_t>& tokens) {
  const TestTensor& embedding = weights.at("model.embed_tokens.weight");
  Matrix x;
  for (const int32_t token : tokens) {
    const float* row = embedding.values.data() + static_cast<size_t>(token) * c.hidden_size;
    x.emplace_back(row, row + c.hidden_size);
  }
  const auto add = [&](const Matrix& y) {
    for (size_t t = 0; t < x.size(); ++t) {
      for (size_t i = 0; i < x[t].size(); ++i) x[t][i] += y[t][i];
    }
  };
  for (int l = 0; l < c.layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    Matrix h = Normed(x, weights.at(p + "input_layernorm.weight").values, c.rms_norm_eps);
    Matrix q = Project(h, weights, p + "self_attn.q_proj"), k = Project(h, weights, p + "self_attn.k_proj");
    RotateHeads(c, weights, p + "self_attn.q_norm.weight", c.query_heads, q);
    RotateHeads(c, weights, p + "self_attn.k_norm.weight", c.kv_heads, k);
    add(Project(Attention(c, q, k, Project(h, weights, p + "self_attn.v_proj")), weights,
                p + "self_attn.o_proj"));
    h = Normed(x, weights.at(p + "post_attention_layernorm.weight").values, c.rms_norm_eps);
    Matrix gate = Project(h, weights, p + "mlp.gate_proj");
    const Matrix up = Project(h, weights, p + "mlp.up_proj");
    for (size_t t = 0; t < gate.size(); ++t) {
      for (size_t i = 0; i < gate[t].size(); ++i) gate[t][i] *= up[t][i] / (1 + std::exp(-gate[t][i]));
    }
    add(Project(gate, weights, p + "mlp.down_proj"));
  }
  x = Normed(x, weights.at("model.norm.weight").values, c.rms_norm_eps);
  std::vector<double> logits;
  for (const auto& row : Project(x, weights, c.tied_embeddings ? "model.embed_tokens" : "lm_head")) {
    logits.insert(logits.end(), row.begin(), row.end());
  }
  return logits;
}

}  // namespace kvtide::engine
