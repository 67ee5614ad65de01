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

bool SameGroup(const LayerGroup& a, const LayerGroup& b) {
  return a.kind == b.kind && a.n_kv_heads == b.n_kv_heads && a.head_dim_k == b.head_dim_k &&
         a.head_dim_v == b.head_dim_v && a.window == b.window && a.state_bytes == b.state_bytes &&
         a.conv_bytes == b.conv_bytes && a.index_keys == b.index_keys && a.compress == b.compress;
}

void AddToGroup(const LayerGroup& one, int layer, std::vector<LayerGroup>* groups) {
  auto it = std::find_if(groups->begin(), groups->end(),
                         [&](const LayerGroup& group) { return SameGroup(group, one); });
  if (it == groups->end()) it = groups->insert(groups->end(), one);
  it->layers.push_back(layer);
}

LayerGroup MainGroup(const LayerGeometry& layer) {
  LayerGroup group;
  group.kind = layer.kind;
  group.n_kv_heads = layer.n_kv_heads;
  group.head_dim_k = layer.head_dim_k;
  group.head_dim_v = layer.head_dim_v;
  group.window = layer.window;
  if (layer.kind == LayerKind::kRecurrent) {
    group.state_bytes = layer.state_bytes;
    group.conv_bytes = layer.conv_bytes;
  }
  return group;
}

// One head of keys without values.
LayerGroup KeyGroup(int width, int compress, bool index_keys) {
  LayerGroup group;
  group.kind = LayerKind::kMla;
  group.n_kv_heads = 1;
  group.head_dim_k = width;
  group.compress = std::max(1, compress);
  group.index_keys = index_keys;
  return group;
}

// What a layer keeps beside its cache.
void AddSideGroups(const LayerGeometry& layer, int index, std::vector<LayerGroup>* groups) {
  if (layer.compress > 1) AddToGroup(KeyGroup(layer.head_dim_k, layer.compress, false), index, groups);
  if (layer.index_dim > 0) AddToGroup(KeyGroup(layer.index_dim, layer.compress, true), index, groups);
  if (layer.kind == LayerKind::kMla && layer.state_bytes > 0) {
    LayerGroup state;
    state.kind = LayerKind::kRecurrent;
    state.state_bytes = layer.state_bytes;
    AddToGroup(state, index, groups);
  }
}

// A weight to compare slices by: f16 bytes at a long context.
int64_t SliceWeight(const ModelGeometry& model, int begin, int end) {
  int64_t weight = 0;
  for (int i = begin; i < end; ++i) {
    const LayerGeometry& layer = model.layers[i];
    if (!layer.OwnsCache()) continue;
    const int64_t tokens = layer.window > 0 ? layer.window : 32768;
    weight +=
        tokens * layer.n_kv_heads * (layer.head_dim_k + layer.head_dim_v) + int64_t{32768} * layer.index_dim;
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
    if ((layer.kind == LayerKind::kRecurrent || layer.kind == LayerKind::kMla) &&
        (layer.state_bytes < 0 || layer.state_bytes > kMaxStateBytes || layer.conv_bytes < 0 ||
         layer.conv_bytes > layer.state_bytes)) {
      status = LayerError(
          i, absl::StrCat("state_bytes is ", layer.state_bytes, ", conv_bytes is ", layer.conv_bytes));
    }
    if (layer.index_dim != 0 &&
        (layer.index_dim < 0 || layer.index_dim > kMaxHeadDim || !layer.OwnsCache())) {
      status = LayerError(i, absl::StrCat("index_dim is ", layer.index_dim, ", expected 1 to ", kMaxHeadDim,
                                          " in a layer that owns a cache"));
    }
    if (layer.compress != 0 && (layer.compress < 0 || layer.compress > kMaxHeadDim ||
                                layer.kind != LayerKind::kMla || layer.window < 1)) {
      status = LayerError(i, absl::StrCat("compress is ", layer.compress, ", expected 1 to ", kMaxHeadDim,
                                          " in a latent layer with a window"));
    }
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

std::vector<LayerGroup> GroupLayers(const ModelGeometry& model) {
  std::vector<LayerGroup> groups;
  for (int i = 0; i < static_cast<int>(model.layers.size()); ++i) {
    const LayerGeometry& layer = model.layers[i];
    if (layer.OwnsCache() || layer.kind == LayerKind::kRecurrent) AddToGroup(MainGroup(layer), i, &groups);
  }
  for (int i = 0; i < static_cast<int>(model.layers.size()); ++i) AddSideGroups(model.layers[i], i, &groups);
  return groups;
}

ModelGeometry ShardHeads(const ModelGeometry& model, int ranks) {
  ModelGeometry shard = model;
  if (ranks <= 1) return shard;
  for (LayerGeometry& layer : shard.layers) {
    if (layer.kind == LayerKind::kRecurrent) {
      layer.state_bytes = (layer.state_bytes + ranks - 1) / ranks;
      layer.conv_bytes = (layer.conv_bytes + ranks - 1) / ranks;
    }
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

LayerGeometry CompressedLatent(int width, int window, int compress, int index_dim) {
  LayerGeometry layer;
  layer.kind = LayerKind::kMla;
  layer.n_kv_heads = 1;
  layer.head_dim_k = width;
  layer.window = window;
  layer.compress = compress;
  if (compress == 4) {
    layer.index_dim = index_dim;
    layer.state_bytes = int64_t{2} * 8 * 2 * (width + index_dim) * 4;
  } else if (compress > 1) {
    layer.state_bytes = int64_t{2} * compress * width * 4;
  }
  return layer;
}

int GroupedQueryRatio(const ModelGeometry& model) {
  for (const LayerGeometry& layer : model.layers) {
    if (layer.OwnsCache()) return layer.n_kv_heads > 0 ? model.n_query_heads / layer.n_kv_heads : 0;
  }
  return 0;
}

}  // namespace kvtide::planner
