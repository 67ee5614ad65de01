// A decoder of the Llama kind (Llama, Mistral, Qwen, Gemma, Phi-3) read from a Hugging Face folder or a GGUF
// file, computed in f32. It holds weights and no keys or values: those go to the KvStore that the caller
// passes, layer by layer. Immutable after Load; the thread pool is borrowed. Several sequences may be run one
// after the other with one model.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/engine/kv_store.h"
#include "clients/engine/model_config.h"
#include "clients/engine/model_files.h"
#include "clients/engine/panel_matmul.h"
#include "kernels/base/thread_pool.h"

namespace kvtide::engine {

class LlamaModel {
 public:
  // Called with the share that is loaded, 0 to 1.
  using Progress = std::function<void(double)>;
  static absl::StatusOr<std::unique_ptr<LlamaModel>> Load(const std::string& path, ThreadPool& pool,
                                                          const Progress& progress = nullptr);

  const ModelConfig& config() const { return config_; }
  KvGeometry kv_geometry() const;
  int64_t parameters() const { return parameters_; }

  // Runs `tokens` at positions start, start + 1, ... of the sequence. `hidden` receives [tokens][hidden_size]
  // after the last norm, ready for Logits. On an error some layers of the store may have the tokens: truncate
  // or close.
  absl::Status Forward(KvStore& store, SequenceId sequence, int64_t start, std::span<const int32_t> tokens,
                       std::vector<float>* hidden) const;

  // logits[rows][vocab_size] from rows of hidden.
  void Logits(const float* hidden, int rows, float* logits) const;

 private:
  struct Layer {
    std::vector<float> attention_norm, mlp_norm, query_norm, key_norm;
    std::vector<float> after_attention, after_mlp;  // of sandwich norms
    PackedMatrix query, key, value, output, gate, up, down;
    std::vector<float> query_bias, key_bias, value_bias, output_bias;
  };
  struct Rotation;  // cos and sin of the positions of a chunk
  class Loader;

  LlamaModel(ThreadPool& pool, ModelFiles files);
  void Rotate(const Rotation& rotation, int n_tokens, int heads, const std::vector<float>& norm,
              float* x) const;
  void NormRows(const float* x, int rows, const std::vector<float>& weight, float* out) const;
  void Embed(std::span<const int32_t> tokens, float* x) const;

  const ModelFiles files_;  // the embedding is read from the file
  const ModelConfig& config_;
  ThreadPool& pool_;
  WeightTensor embedding_;
  std::vector<double> rope_frequencies_, local_frequencies_;
  std::vector<Layer> layers_;
  std::vector<float> final_norm_;
  PackedMatrix head_;
  int64_t parameters_ = 0;
};

}  // namespace kvtide::engine
