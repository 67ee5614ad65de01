// What a calibration text says about the keys of a model: their mean, for each layer, KV head and channel. K
// is then coded as its difference from the mean (kernels/format/profile.h says why attention stays exact).
//
// A file is safetensors: metadata "format" = "kvtide-key-profile-1", "model", "text", "tokens"; tensors
// "layers.N.key_mean", f32 [kv_heads][head_dim]. A reader refuses other formats by name; new parts, such as
// transforms, get tensors and a format number of their own.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/engine/kv_store.h"

namespace kvtide::engine {

struct KeyProfile {
  std::string model, text;  // names, for people
  int64_t tokens = 0;       // that the means are over
  int kv_heads = 0, head_dim = 0;
  std::vector<std::vector<float>> means;  // by layer, [kv_heads][head_dim]
};

absl::Status WriteKeyProfile(const std::string& path, const KeyProfile& profile);
absl::StatusOr<KeyProfile> ReadKeyProfile(const std::string& path);

// INVALID_ARGUMENT if the profile is of a model with other layers.
absl::Status CheckKeyProfile(const KeyProfile& profile, const KvGeometry& geometry);

// A KvStore's visitor (CaptureKvStore) that adds keys up.
class KeyMeans {
 public:
  explicit KeyMeans(const KvGeometry& geometry);
  // Keys [n][kv_heads][head_dim] of one layer.
  void Add(int layer, int n, const float* k);
  // Tokens that the first layer was given.
  int64_t tokens() const { return tokens_.front(); }
  // Every layer was given a token.
  std::vector<std::vector<float>> means() const;

 private:
  std::vector<std::vector<double>> sums_;
  std::vector<int64_t> tokens_;
};

}  // namespace kvtide::engine
