#include "daemon/cache/call/spec_hash.h"

#include <xxhash.h>

#include <bit>

namespace kvtide {
namespace {

// A text that is different for different values: every number has 8 bytes.
class Bytes {
 public:
  Bytes& Add(uint64_t value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Bytes& Add(int value) { return Add(static_cast<uint64_t>(value)); }
  Bytes& Add(const GroupShape& shape) {
    return Add(shape.layers).Add(shape.kv_heads).Add(shape.head_dim_k).Add(shape.head_dim_v);
  }
  uint64_t Hash() const { return XXH3_64bits(text_.data(), text_.size()); }

 private:
  std::string text_;
};

}  // namespace

uint64_t HashNameSpace(const std::string& name_space) {
  return XXH3_64bits(name_space.data(), name_space.size());
}

uint64_t HashModel(const ModelSpec& spec) {
  Bytes bytes;
  bytes.Add(HashNameSpace(spec.name)).Add(uint64_t{spec.groups.size()});
  for (const LayerGroupSpec& group : spec.groups) {
    bytes.Add(group.shape)
        .Add(static_cast<uint64_t>(group.window))
        .Add(group.heads)
        .Add(uint64_t{std::bit_cast<uint32_t>(group.scale)})
        .Add(uint64_t{std::bit_cast<uint32_t>(group.softcap)});
    for (const float mean : group.key_means) bytes.Add(uint64_t{std::bit_cast<uint32_t>(mean)});
    if (group.key_transforms.empty()) continue;
    const KeyTransforms& keys = group.key_transforms;
    bytes.Add(static_cast<int>(keys.pairs));
    for (const auto* values : {&keys.frequencies, &keys.centres, &keys.matrices})
      bytes.Add(XXH3_64bits(values->data(), values->size() * sizeof(float)));
    bytes.Add(XXH3_64bits(keys.widths.data(), keys.widths.size()));
  }
  for (const LayerSpec& layer : spec.layers) bytes.Add(layer.group).Add(layer.layer_in_group);
  return bytes.Hash();
}

uint64_t HashLayout(const BlockLayout& layout) {
  return Bytes()
      .Add(uint64_t{kPageOrderVersion})
      .Add(uint64_t{kBlockTokens})
      .Add(layout.shape())
      .Add(uint64_t{layout.record_bytes()})
      .Add(uint64_t{layout.k_scales()})
      .Add(uint64_t{layout.v_codes()})
      .Add(uint64_t{layout.v_scales()})
      .Hash();
}

}  // namespace kvtide
