// What a calibration text says about the keys of a model: their mean, for each layer, KV head and channel,
// and the transforms of calibrated K types (kernels/format/tide.h). K is then coded as its difference from
// the mean (kernels/format/profile.h says why attention stays exact).
//
// A file is safetensors: metadata "format" = "kvtide-key-profile-1", "model", "text", "tokens"; tensors
// "layers.N.key_mean", f32 [kv_heads][head_dim]. With transforms the format is "kvtide-key-profile-3", and
// there are "layers.N.key_frequencies", f32 [pairs], of RoPE in radians a position, metadata "rope_pairs" =
// "halves" or "neighbours" (rope.h), and of keys with RoPE taken back: "layers.N.key_centre", f32
// [kv_heads][head_dim], their mean, "layers.N.key_transform", f32 [kv_heads][head_dim][head_dim], channel by
// coefficient, and "layers.N.key_widths", f32 holding integers, [kv_heads][types tide4 to tide1][groups
// of 8 coefficients]. Format "kvtide-key-profile-4" is the same of keys as they are stored, after RoPE, whose
// statistics hold for the positions that the text had: metadata "context", tokens of a window (0 = not said).
// A reader refuses other formats by name; 2 had transforms of keys after RoPE and another layout.
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
  // By layer; empty = none. Their RoPE is that of the model, whether or not it was taken back.
  std::vector<KeyTransforms> transforms;
  bool after_rope = false;  // transforms are of keys as they are stored
  int64_t context = 0;      // tokens of the text's windows, 0 = not known

  // The transforms of a layer as sequences take them: without RoPE where it is not taken back.
  KeyTransforms Coding(size_t layer) const;
};

absl::Status WriteKeyProfile(const std::string& path, const KeyProfile& profile);
absl::StatusOr<KeyProfile> ReadKeyProfile(const std::string& path);

// INVALID_ARGUMENT if the profile is of a model with other layers or another RoPE.
absl::Status CheckKeyProfile(const KeyProfile& profile, const KvGeometry& geometry);

// The profile as the daemon will have it, all layers being one group. INVALID_ARGUMENT as
// MakeCalibratedProfile has it.
absl::StatusOr<Profile> FormatProfile(const KeyProfile& profile);

// The profile's parts, for sequences of a model that it fits (CheckKeyProfile).
void UseKeyProfile(const KeyProfile& profile, KvGeometry* geometry);

}  // namespace kvtide::engine
