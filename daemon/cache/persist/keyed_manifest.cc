#include "daemon/cache/persist/keyed_manifest.h"

#include "absl/strings/str_cat.h"
#include "daemon/cache/persist/manifest_bytes.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint32_t kMagic = 0x534b5654;  // no version of a sequence's manifest
// 1: without what blocks may be recoded as and were.
constexpr uint32_t kVersion = 2, kOldestVersion = 1;

}  // namespace

std::string EncodeKeyedManifest(const KeyedManifest& manifest) {
  ManifestWriter out;
  out.Put(kMagic);
  out.Put(kVersion);
  out.Put(manifest.written_at);
  out.Put(manifest.id);
  const NamespaceSpec& spec = manifest.spec;
  out.PutText(spec.model);
  out.PutText(spec.salt);
  out.PutText(spec.tenant);
  out.Put(int32_t{spec.block_tokens});
  out.Put(uint8_t{spec.opaque.has_value()});
  if (spec.opaque.has_value()) {
    out.Put(spec.opaque->block_bytes);
    out.PutText(spec.opaque->encoding);
  } else {
    for (const int value :
         {spec.tensors->layers, spec.tensors->kv_heads, spec.tensors->head_dim_k, spec.tensors->head_dim_v})
      out.Put(int32_t{value});
    out.PutText(PairName(spec.tensors->pair));
  }
  out.Put(uint64_t{spec.degrade.size()});
  for (const CachePair& rung : spec.degrade) out.PutText(PairName(rung));
  out.Put(static_cast<uint8_t>(manifest.persistence));
  out.Put(uint64_t{manifest.blocks.size()});
  for (const KeyedManifestBlock& block : manifest.blocks) {
    for (const uint64_t value : {block.key.low, block.key.high, block.offset, block.write_id, block.checksum})
      out.Put(value);
    out.Put(block.rung);
  }
  return out.Take();
}

bool IsKeyedManifest(const std::string& bytes) {
  ManifestReader in(bytes);
  return in.Get<uint32_t>() == kMagic && !in.failed();
}

int64_t WrittenAt(const std::string& bytes) {
  ManifestReader in(bytes);
  in.Get<uint64_t>();
  return in.Get<int64_t>();
}

namespace {

absl::Status GetPair(ManifestReader& in, CachePair* pair) {
  const std::string name = in.GetText();
  if (in.failed()) return absl::DataLossError("it is cut off");
  const absl::StatusOr<CachePair> parsed = ParseCachePair(name);
  if (!parsed.ok()) return absl::FailedPreconditionError(parsed.status().message());
  *pair = *parsed;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<KeyedManifest> DecodeKeyedManifest(const std::string& bytes) {
  ManifestReader in(bytes);
  if (in.Get<uint32_t>() != kMagic) return absl::DataLossError("it is no list of blocks");
  const auto version = in.Get<uint32_t>();
  if (version < kOldestVersion || version > kVersion)
    return absl::FailedPreconditionError(absl::StrCat(
        "it was written in version ", version, ", this build reads ", kOldestVersion, " to ", kVersion));
  KeyedManifest manifest;
  in.Get(&manifest.written_at);
  in.Get(&manifest.id);
  NamespaceSpec& spec = manifest.spec;
  spec.model = in.GetText();
  spec.salt = in.GetText();
  spec.tenant = in.GetText();
  spec.block_tokens = in.Get<int32_t>();
  if (in.Get<uint8_t>() != 0) {
    spec.opaque.emplace();
    in.Get(&spec.opaque->block_bytes);
    spec.opaque->encoding = in.GetText();
  } else {
    TensorContent& tensors = spec.tensors.emplace();
    for (int* value : {&tensors.layers, &tensors.kv_heads, &tensors.head_dim_k, &tensors.head_dim_v})
      *value = in.Get<int32_t>();
    KVTIDE_RETURN_IF_ERROR(GetPair(in, &tensors.pair));
  }
  if (version >= 2) {
    spec.degrade.resize(in.GetCount(sizeof(uint64_t)));
    for (CachePair& rung : spec.degrade) KVTIDE_RETURN_IF_ERROR(GetPair(in, &rung));
  }
  const auto persistence = in.Get<uint8_t>();
  if (persistence > static_cast<uint8_t>(Persistence::kAll))
    return absl::DataLossError("it has no such persistence");
  manifest.persistence = static_cast<Persistence>(persistence);
  const size_t count = in.GetCount(5 * sizeof(uint64_t) + (version >= 2 ? 1 : 0));
  for (size_t i = 0; i < count; i++) {
    KeyedManifestBlock& block = manifest.blocks.emplace_back();
    for (uint64_t* value : {&block.key.low, &block.key.high, &block.offset, &block.write_id, &block.checksum})
      in.Get(value);
    if (version >= 2) in.Get(&block.rung);
    if (block.rung > spec.degrade.size()) return absl::DataLossError("a block is coded as none of its pairs");
  }
  if (in.failed() || !in.at_end()) return absl::DataLossError("it is cut off, or longer than it says");
  if (const absl::Status status = CheckNamespaceSpec(spec); !status.ok())
    return absl::DataLossError(status.message());
  if (HashNamespaceSpec(spec) != manifest.id)
    return absl::FailedPreconditionError(
        absl::StrCat("namespace of '", spec.model,
                     "': this build codes its blocks in another version, or in another order of bytes"));
  return manifest;
}

}  // namespace kvtide
