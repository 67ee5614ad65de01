#include "tests/clients/engine/test_gguf.h"

#include <utility>

namespace kvtide::engine {
namespace {

template <class T>
void Put(std::string* to, T value) {
  to->append(reinterpret_cast<const char*>(&value), sizeof(T));
}
void PutText(std::string* to, const std::string& text) {
  Put<uint64_t>(to, text.size());
  *to += text;
}

// Row i of a head's first half beside row i of its second half.
TestTensor Paired(const TestTensor& from, int heads) {
  TestTensor to = from;
  const int64_t width = from.shape.size() < 2 ? 1 : from.shape[1], dim = from.shape[0] / heads;
  for (int h = 0; h < heads; ++h)
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t i = 0; i < dim / 2; ++i)
        for (int64_t c = 0; c < width; ++c)
          to.values[(h * dim + 2 * i + half) * width + c] =
              from.values[(h * dim + half * dim / 2 + i) * width + c];
  return to;
}

}  // namespace

void GgufWriter::Key(const std::string& key, uint32_t type) {
  PutText(&metadata_, key);
  Put(&metadata_, type);
  ++keys_;
}
void GgufWriter::Integer(const std::string& key, uint32_t value) {
  Key(key, 4);
  Put(&metadata_, value);
}
void GgufWriter::Number(const std::string& key, float value) {
  Key(key, 6);
  Put(&metadata_, value);
}
void GgufWriter::Flag(const std::string& key, bool value) {
  Key(key, 7);
  Put<uint8_t>(&metadata_, value);
}
void GgufWriter::Text(const std::string& key, const std::string& value) {
  Key(key, 8);
  PutText(&metadata_, value);
}
void GgufWriter::Texts(const std::string& key, const std::vector<std::string>& values) {
  Key(key, 9);
  Put<uint32_t>(&metadata_, 8);
  Put<uint64_t>(&metadata_, values.size());
  for (const std::string& value : values) PutText(&metadata_, value);
}
void GgufWriter::Integers(const std::string& key, const std::vector<int32_t>& values) {
  Key(key, 9);
  Put<uint32_t>(&metadata_, 5);
  Put<uint64_t>(&metadata_, values.size());
  for (const int32_t value : values) Put(&metadata_, value);
}
void GgufWriter::Numbers(const std::string& key, const std::vector<float>& values) {
  Key(key, 9);
  Put<uint32_t>(&metadata_, 6);
  Put<uint64_t>(&metadata_, values.size());
  for (const float value : values) Put(&metadata_, value);
}

void GgufWriter::Tensor(const std::string& name, GgufType type, const std::vector<int64_t>& shape,
                        const std::string& bytes) {
  PutText(&tensors_, name);
  Put<uint32_t>(&tensors_, static_cast<uint32_t>(shape.size()));
  for (size_t d = shape.size(); d-- > 0;) Put<uint64_t>(&tensors_, static_cast<uint64_t>(shape[d]));
  Put(&tensors_, static_cast<uint32_t>(type));
  data_.resize((data_.size() + 31) / 32 * 32);
  Put<uint64_t>(&tensors_, data_.size());
  data_ += bytes;
  ++count_;
}

void GgufWriter::Tensor(const std::string& name, const TestTensor& tensor) {
  Tensor(name, GgufType::kF32, tensor.shape,
         std::string(reinterpret_cast<const char*>(tensor.values.data()), tensor.values.size() * 4));
}

std::string GgufWriter::Bytes() const {
  std::string file = "GGUF";
  Put<uint32_t>(&file, 3);
  Put<uint64_t>(&file, count_);
  Put<uint64_t>(&file, keys_);
  file += metadata_ + tensors_;
  file.resize((file.size() + 31) / 32 * 32);
  return file + data_;
}

void WriteLlamaGguf(const ModelConfig& c, const TestTensors& weights, GgufWriter& file) {
  file.Text("general.architecture", "llama");
  file.Integer("llama.block_count", static_cast<uint32_t>(c.layers));
  file.Integer("llama.embedding_length", static_cast<uint32_t>(c.hidden_size));
  file.Integer("llama.feed_forward_length", static_cast<uint32_t>(c.intermediate_size));
  file.Integer("llama.attention.head_count", static_cast<uint32_t>(c.query_heads));
  file.Integer("llama.attention.head_count_kv", static_cast<uint32_t>(c.kv_heads));
  file.Integer("llama.attention.key_length", static_cast<uint32_t>(c.head_dim));
  file.Integer("llama.attention.value_length", static_cast<uint32_t>(c.head_dim));
  file.Integer("llama.context_length", static_cast<uint32_t>(c.max_positions));
  file.Number("llama.rope.freq_base", static_cast<float>(c.rope_theta));
  file.Number("llama.attention.layer_norm_rms_epsilon", c.rms_norm_eps);
  const std::pair<const char*, const char*> names[] = {
      {"input_layernorm", "attn_norm"}, {"post_attention_layernorm", "ffn_norm"},
      {"self_attn.q_proj", "attn_q"},   {"self_attn.k_proj", "attn_k"},
      {"self_attn.v_proj", "attn_v"},   {"self_attn.o_proj", "attn_output"},
      {"mlp.gate_proj", "ffn_gate"},    {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"}};
  file.Tensor("token_embd.weight", weights.at("model.embed_tokens.weight"));
  file.Tensor("output_norm.weight", weights.at("model.norm.weight"));
  if (!c.tied_embeddings) file.Tensor("output.weight", weights.at("lm_head.weight"));
  for (int l = 0; l < c.layers; ++l)
    for (const auto& [hugging_face, gguf] : names)
      for (const char* kind : {".weight", ".bias"}) {
        const auto found = weights.find("model.layers." + std::to_string(l) + "." + hugging_face + kind);
        if (found == weights.end()) continue;
        const std::string name = gguf;
        const int heads = name == "attn_q" ? c.query_heads : name == "attn_k" ? c.kv_heads : 0;
        file.Tensor("blk." + std::to_string(l) + "." + name + kind,
                    heads == 0 ? found->second : Paired(found->second, heads));
      }
}

}  // namespace kvtide::engine
