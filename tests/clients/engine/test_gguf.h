// Writes GGUF files for tests: metadata of any kind, tensors of any type.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "clients/engine/gguf_blocks.h"
#include "tests/clients/engine/test_model.h"

namespace kvtide::engine {

class GgufWriter {
 public:
  void Integer(const std::string& key, uint32_t value);
  void Number(const std::string& key, float value);
  void Flag(const std::string& key, bool value);
  void Text(const std::string& key, const std::string& value);
  void Texts(const std::string& key, const std::vector<std::string>& values);
  void Integers(const std::string& key, const std::vector<int32_t>& values);
  void Numbers(const std::string& key, const std::vector<float>& values);
  // `shape` as in safetensors: [rows][values].
  void Tensor(const std::string& name, GgufType type, const std::vector<int64_t>& shape,
              const std::string& bytes);
  void Tensor(const std::string& name, const TestTensor& tensor);  // F32
  std::string Bytes() const;

 private:
  void Key(const std::string& key, uint32_t type);

  std::string metadata_, tensors_, data_;
  uint64_t keys_ = 0, count_ = 0;
};

// The weights of a Llama model as a converter writes them: other names, rows of q and k in pairs.
void WriteLlamaGguf(const ModelConfig& config, const TestTensors& weights, GgufWriter& file);

}  // namespace kvtide::engine
