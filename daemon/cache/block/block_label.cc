#include "daemon/cache/block/block_label.h"

#include "daemon/cache/call/spec_hash.h"

namespace kvtide {

void SetLayout(const BlockLayout& layout, BlockLabel* label) {
  label->k_type = Name(layout.pair().k);
  label->v_type = Name(layout.pair().v);
  label->codec_version_k = Info(layout.pair().k).version;
  label->codec_version_v = Info(layout.pair().v).version;
  label->layout_hash = HashLayout(layout);
}

BlockLabel LabelOf(const Block& block, const Place& place) {
  BlockLabel label;
  label.kind = BlockLabel::Kind::kBlock;
  label.write_id = place.Written().write_id;
  label.bytes = block.bytes();
  label.checksum = block.has_checksum ? block.checksum : 0;
  label.model_hash = block.kind->model_hash;
  label.sequence = block.sequence;
  label.name_space_hash = block.kind->name_space_hash;
  label.group = block.group();
  label.index = block.index;
  if (block.kind->stamped_with_key) label.chain = {block.key.low, block.key.high};
  label.profile_hash = place.Written().profile_hash;
  label.k_type = label.v_type = "opaque";
  if (block.layout() != nullptr) SetLayout(*block.layout(), &label);
  return label;
}

}  // namespace kvtide
