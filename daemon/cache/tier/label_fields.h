// A BlockLabel (io_tier.h) in a struct that is stored as its bytes lie: its fields have the label's names,
// names of types are 16 characters behind whose end stand zeros. The disk's extents and the values of a
// remote tier have such structs, each with fields of its own beside them.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/status/statusor.h"
#include "daemon/cache/tier/io_tier.h"
#include "kernels/base/check.h"

namespace kvtide {

template <class Stored>
void StoreLabel(const BlockLabel& label, Stored* to) {
  const auto set_name = [](const std::string& name, char(&field)[16]) {
    KVTIDE_CHECK(name.size() < sizeof field, "the name of the type is too long: ", name);
    std::copy(name.begin(), name.end(), field);
  };
  to->kind = static_cast<uint32_t>(label.kind);
  to->write_id = label.write_id;
  to->bytes = label.bytes;
  to->checksum = label.checksum;
  to->model_hash = label.model_hash;
  to->sequence = label.sequence;
  to->name_space_hash = label.name_space_hash;
  to->tenant = label.tenant;
  std::copy(label.chain.begin(), label.chain.end(), to->chain);
  to->index = label.index;
  to->group = label.group;
  to->codec_version_k = label.codec_version_k;
  to->codec_version_v = label.codec_version_v;
  to->profile_hash = label.profile_hash;
  to->layout_hash = label.layout_hash;
  set_name(label.k_type, to->k_type);
  set_name(label.v_type, to->v_type);
}

// DataLoss for a name without an end: nothing that was stored has one.
template <class Stored>
absl::StatusOr<BlockLabel> LoadLabel(const Stored& from) {
  const auto name_of = [](const char(&field)[16]) {
    return std::string(field, strnlen(field, sizeof field));
  };
  for (const auto* const field : {&from.k_type, &from.v_type})
    if (strnlen(*field, sizeof *field) == sizeof *field)
      return absl::DataLossError("the label has the name of a type without an end");
  BlockLabel label;
  label.kind = static_cast<BlockLabel::Kind>(from.kind);
  label.write_id = from.write_id;
  label.bytes = from.bytes;
  label.checksum = from.checksum;
  label.model_hash = from.model_hash;
  label.sequence = from.sequence;
  label.name_space_hash = from.name_space_hash;
  label.tenant = from.tenant;
  label.chain = {from.chain[0], from.chain[1]};
  label.index = from.index;
  label.group = from.group;
  label.codec_version_k = from.codec_version_k;
  label.codec_version_v = from.codec_version_v;
  label.profile_hash = from.profile_hash;
  label.layout_hash = from.layout_hash;
  label.k_type = name_of(from.k_type);
  label.v_type = name_of(from.v_type);
  return label;
}

}  // namespace kvtide
