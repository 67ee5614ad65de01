// A captured K/V/Q file: what the attention layers of a model saw of one text, as a safetensors file that
// anybody can write (README.md, "Captured files"):
//     layers.{i}.k [tokens, kv_heads, head_dim_k]   keys as a cache would get them, after RoPE
//     layers.{i}.v [tokens, kv_heads, head_dim_v]
//     layers.{i}.q [queries, heads, head_dim_k]     of the last tokens
//     layers.{i}.sinks [heads]                      optional: logits of attention sinks
// in F32, F16 or BF16. Reading is strict: what is missing or odd is an error that names the tensor. Immutable
// after Open; layers may be read from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cli/eval/eval_layers.h"
#include "clients/engine/safetensors.h"

namespace kvtide::cli {

// Names in the file's metadata; all of them are optional.
inline constexpr char kCaptureModel[] = "model";
inline constexpr char kCaptureText[] = "text";
inline constexpr char kCaptureRope[] = "rope";              // "applied"; anything else is refused
inline constexpr char kCaptureScale[] = "scale";            // of logits; default 1 / sqrt(head_dim_k)
inline constexpr char kCaptureWindow[] = "sliding_window";  // of all layers, in tokens

struct CapturedLayer {
  LayerShape shape;
  int64_t tokens = 0, queries = 0;
  engine::WeightTensor q, k, v, sinks;  // sinks without bytes: none
};

// Reads the header of a whole file in memory; the layers borrow from it.
absl::StatusOr<std::vector<CapturedLayer>> ParseCapture(std::span<const std::byte> file,
                                                        std::map<std::string, std::string>* metadata);

class CapturedFile {
 public:
  static absl::StatusOr<CapturedFile> Open(const std::string& path);

  const std::vector<CapturedLayer>& layers() const { return layers_; }
  int64_t tokens() const { return layers_.front().tokens; }
  // "" without an entry.
  std::string Metadata(const std::string& name) const;
  // Of all bytes.
  uint64_t Hash() const;

  // The vectors of a layer. INVALID_ARGUMENT names the first value that is NaN or infinite.
  absl::StatusOr<LayerVectors> Read(int layer) const;

 private:
  std::string path_;
  std::unique_ptr<engine::MappedFile> file_;
  std::map<std::string, std::string> metadata_;
  std::vector<CapturedLayer> layers_;
};

}  // namespace kvtide::cli
