// The geometry of a model as the cache needs it: its layers, which layer group each belongs to, and how its
// attention is scaled. Plain data; a registered model never changes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/format/profile.h"

namespace kvtide {

struct LayerGroupSpec {
  GroupShape shape;    // layers, KV heads, head dims
  int64_t window = 0;  // a query at position p sees positions > p - window; 0 = all
  int heads = 0;       // query heads, a multiple of the KV heads
  float scale = 0;     // of q.k; 0 = 1 / sqrt(head_dim_k)
  float softcap = 0;   // 0 = none
  // Mean of K over a calibration text, [layers][kv_heads][head_dim_k]; empty = not calibrated.
  std::vector<float> key_means;
  KeyTransforms key_transforms;  // for calibrated K types, beside the means; empty = none
  bool operator==(const LayerGroupSpec&) const = default;
};

// A model layer is layer `layer_in_group` of group `group`.
struct LayerSpec {
  int group = 0;
  int layer_in_group = 0;
  bool operator==(const LayerSpec&) const = default;
};

constexpr size_t kMostModelLayers = 4096;

struct ModelSpec {
  std::string name;
  std::vector<LayerGroupSpec> groups;
  std::vector<LayerSpec> layers;  // by model layer; every (group, layer_in_group) occurs exactly once
  bool operator==(const ModelSpec&) const = default;
};

// A profile of keys that was installed for a registered model.
struct InstalledProfile {
  std::string model, tenant;
  uint64_t revision = 0;  // counts those of the model, from 1
  bool after_rope = false;
  int64_t sequences = 0;  // open ones that have it
};

// The model without profiles of keys.
ModelSpec WithoutProfiles(ModelSpec spec);

// InvalidArgument that names the field and the limit.
absl::Status CheckModelSpec(const ModelSpec& spec);

// All layers alike: one group of `layers` layers.
ModelSpec UniformModel(std::string name, const GroupShape& shape, int heads);

}  // namespace kvtide
