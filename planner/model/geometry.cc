#include "planner/model/geometry.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace kvtide::planner {
namespace {

constexpr int kMaxLayers = 4096;
constexpr int kMaxHeads = 65536;
constexpr int kMaxHeadDim = 65536;
constexpr int64_t kMaxStateBytes = int64_t{1} << 40;

absl::Status LayerError(int index, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("layer ", index, ": ", what));
}

absl::Status ValidateAttention(const LayerGeometry& layer, int index) {
  if (layer.n_kv_heads < 1 || layer.n_kv_heads > kMaxHeads) {
    return LayerError(index, absl::StrCat("n_kv_heads is ", layer.n_kv_heads, ", expected 1 to ", kMaxHeads));
  }
  if (layer.head_dim_k < 1 || layer.head_dim_k > kMaxHeadDim) {
    return LayerError(index,
                      absl::StrCat("head_dim_k is ", layer.head_dim_k, ", expected 1 to ", kMaxHeadDim));
  }
  const bool mla = layer.kind == LayerKind::kMla;
  if (mla ? layer.head_dim_v != 0 : (layer.head_dim_v < 1 || layer.head_dim_v > kMaxHeadDim)) {
    return LayerError(index, absl::StrCat("head_dim_v is ", layer.head_dim_v,
                                          mla ? ", expected 0 for a latent layer" : ", expected 1 or more"));
  }
  const bool windowed = layer.kind == LayerKind::kSliding || layer.kind == LayerKind::kChunked;
  if (windowed && layer.window < 1) {
    return LayerError(index, absl::StrCat("window is ", layer.window, ", expected 1 or more for a ",
                                          LayerKindName(layer.kind), " layer"));
  }
  return absl::OkStatus();
}

absl::Status ValidateSharing(const ModelGeometry& model, int index) {
  const int target = model.layers[index].shared_with;
  if (target < 0 || target >= static_cast<int>(model.layers.size())) {
    return LayerError(index, absl::StrCat("shares the cache of layer ", target, ", which does not exist"));
  }
  if (target >= index) {
    return LayerError(index, absl::StrCat("shares the cache of layer ", target,
                                          "; a layer can only share with an earlier one (cyclic sharing)"));
  }
  if (!model.layers[target].OwnsCache()) {
    return LayerError(index, absl::StrCat("shares the cache of layer ", target, ", which owns none (",
                                          LayerKindName(model.layers[target].kind), ")"));
  }
  return absl::OkStatus();
}

bool SameGroup(const LayerGroup& group, const LayerGeometry& layer) {
  return group.kind == layer.kind && group.n_kv_heads == layer.n_kv_heads &&
         group.head_dim_k == layer.head_dim_k && group.head_dim_v == layer.head_dim_v &&
         group.window == layer.window && group.state_bytes == layer.state_bytes;
}

// A weight to compare slices by: f16 bytes at a long context.
int64_t SliceWeight(const ModelGeometry& model, int begin, int end) {
  int64_t weight = 0;
  for (int i = begin; i < end; ++i) {
    const LayerGeometry& layer = model.layers[i];
    if (!layer.OwnsCache()) continue;
    const int64_t tokens = layer.window > 0 ? layer.window : 32768;
    weight += tokens * layer.n_kv_heads * (layer.head_dim_k + layer.head_dim_v);
  }
  return weight;
}

}  // namespace

const char* LayerKindName(LayerKind kind) {
  switch (kind) {
    case LayerKind::kFull:
      return "full";
    case LayerKind::kSliding:
      return "sliding";
    case LayerKind::kChunked:
      return "chunked";
    case LayerKind::kMla:
      return "mla";
    case LayerKind::kRecurrent:
      return "recurrent";
    case LayerKind::kShared:
      return "shared";
    case LayerKind::kNone:
      return "none";
  }
  return "unknown";
}

absl::Status ValidateGeometry(const ModelGeometry& model) {
  if (model.layers.empty()) return absl::InvalidArgumentError("the model has no layers");
  if (model.layers.size() > kMaxLayers) {
    return absl::InvalidArgumentError(absl::StrCat("the model has ", model.layers.size(), " layers, at most ",
                                                   kMaxLayers, " are supported"));
  }
  for (int i = 0; i < static_cast<int>(model.layers.size()); ++i) {
    const LayerGeometry& layer = model.layers[i];
    absl::Status status;
    if (layer.OwnsCache()) status = ValidateAttention(layer, i);
    if (layer.kind == LayerKind::kShared) status = ValidateSharing(model, i);
    if (layer.kind == LayerKind::kRecurrent &&
        (layer.state_bytes < 0 || layer.state_bytes > kMaxStateBytes)) {
      status = LayerError(i, absl::StrCat("state_bytes is ", layer.state_bytes));
    }
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

std::vector<LayerGroup> GroupLayers(const ModelGeometry& model) {
  std::vector<LayerGroup> groups;
  for (int i = 0; i < static_cast<int>(model.layers.size()); ++i) {
    const LayerGeometry& layer = model.layers[i];
    if (!layer.OwnsCache() && layer.kind != LayerKind::kRecurrent) continue;
    auto it = std::find_if(groups.begin(), groups.end(),
                           [&](const LayerGroup& group) { return SameGroup(group, layer); });
    if (it == groups.end()) {
      LayerGroup group;
      group.kind = layer.kind;
      group.n_kv_heads = layer.n_kv_heads;
      group.head_dim_k = layer.head_dim_k;
      group.head_dim_v = layer.head_dim_v;
      group.window = layer.window;
      group.state_bytes = layer.state_bytes;
      it = groups.insert(groups.end(), group);
    }
    it->layers.push_back(i);
  }
  return groups;
}

ModelGeometry ShardHeads(const ModelGeometry& model, int ranks) {
  ModelGeometry shard = model;
  if (ranks <= 1) return shard;
  for (LayerGeometry& layer : shard.layers) {
    if (layer.kind == LayerKind::kRecurrent) layer.state_bytes = (layer.state_bytes + ranks - 1) / ranks;
    if (layer.kind == LayerKind::kMla) continue;
    if (layer.n_kv_heads > 0) layer.n_kv_heads = std::max(1, (layer.n_kv_heads + ranks - 1) / ranks);
  }
  shard.n_query_heads = (model.n_query_heads + ranks - 1) / ranks;
  return shard;
}

ModelGeometry FullestLayerSlice(const ModelGeometry& model, int ranks) {
  if (ranks <= 1) return model;
  const int n = static_cast<int>(model.layers.size());
  int best_begin = 0, best_end = n;
  int64_t best = -1;
  for (int rank = 0; rank < ranks; ++rank) {
    const int begin = static_cast<int>(int64_t{n} * rank / ranks);
    const int end = static_cast<int>(int64_t{n} * (rank + 1) / ranks);
    const int64_t weight = SliceWeight(model, begin, end);
    if (weight > best) best = weight, best_begin = begin, best_end = end;
  }
  ModelGeometry slice = model;
  slice.layers.assign(model.layers.begin() + best_begin, model.layers.begin() + best_end);
  for (LayerGeometry& layer : slice.layers) {
    if (layer.kind != LayerKind::kShared) continue;
    layer.shared_with -= best_begin;
    if (layer.shared_with < 0) layer.kind = LayerKind::kNone;
  }
  return slice;
}

int GroupedQueryRatio(const ModelGeometry& model) {
  for (const LayerGeometry& layer : model.layers) {
    if (layer.OwnsCache()) return layer.n_kv_heads > 0 ? model.n_query_heads / layer.n_kv_heads : 0;
  }
  return 0;
}

}  // namespace kvtide::planner
