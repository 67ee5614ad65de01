#include "daemon/cache/persist/manifest.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/cache/persist/manifest_bytes.h"
#include "kernels/base/status.h"
#include "kernels/format/tide_maker.h"

namespace kvtide {
namespace {

// 5: without tokens; 6: without revisions of models; 7: without what blocks may be recoded as.
constexpr uint32_t kVersion = 8, kOldest = 5;

void PutShape(ManifestWriter& out, const GroupShape& shape) {
  for (const int value : {shape.layers, shape.kv_heads, shape.head_dim_k, shape.head_dim_v})
    out.Put(int32_t{value});
}
GroupShape GetShape(ManifestReader& in) {
  GroupShape shape;
  for (int* value : {&shape.layers, &shape.kv_heads, &shape.head_dim_k, &shape.head_dim_v})
    *value = in.Get<int32_t>();
  return shape;
}

void PutModel(ManifestWriter& out, const ModelSpec& model) {
  out.PutText(model.name);
  out.Put(uint64_t{model.groups.size()});
  for (const LayerGroupSpec& group : model.groups) {
    PutShape(out, group.shape);
    out.Put(group.window);
    out.Put(int32_t{group.heads});
    out.Put(group.scale);
    out.Put(group.softcap);
    out.PutList(group.key_means);
    out.Put(static_cast<uint8_t>(group.key_transforms.pairs));
    out.PutList(group.key_transforms.frequencies);
    out.PutList(group.key_transforms.centres);
    out.PutList(group.key_transforms.matrices);
    out.PutList(group.key_transforms.widths);
  }
  out.Put(uint64_t{model.layers.size()});
  for (const LayerSpec& layer : model.layers) {
    out.Put(int32_t{layer.group});
    out.Put(int32_t{layer.layer_in_group});
  }
}
ModelSpec GetModel(ManifestReader& in) {
  ModelSpec model;
  model.name = in.GetText();
  model.groups.resize(in.GetCount(60));
  for (LayerGroupSpec& group : model.groups) {
    group.shape = GetShape(in);
    in.Get(&group.window);
    group.heads = in.Get<int32_t>();
    in.Get(&group.scale);
    in.Get(&group.softcap);
    group.key_means = in.GetList<float>();
    group.key_transforms.pairs = static_cast<RopePairs>(in.Get<uint8_t>());
    group.key_transforms.frequencies = in.GetList<float>();
    group.key_transforms.centres = in.GetList<float>();
    group.key_transforms.matrices = in.GetList<float>();
    group.key_transforms.widths = in.GetList<uint8_t>();
  }
  model.layers.resize(in.GetCount(8));
  for (LayerSpec& layer : model.layers) {
    layer.group = in.Get<int32_t>();
    layer.layer_in_group = in.Get<int32_t>();
  }
  return model;
}

void PutOptions(ManifestWriter& out, const SequenceOptions& options) {
  out.PutText(PairName(options.pair));
  out.Put(uint64_t{options.group_pairs.size()});
  for (const CachePair& pair : options.group_pairs) out.PutText(PairName(pair));
  out.Put(int64_t{options.exact_window.first_blocks});
  out.Put(int64_t{options.exact_window.last_blocks});
  out.Put(static_cast<uint8_t>(options.centre));
  out.Put(
      static_cast<uint8_t>(options.equalise.has_value() ? 1 + static_cast<uint8_t>(*options.equalise) : 0));
  out.Put(static_cast<uint8_t>(options.rope_pairs));
  out.PutText(options.name_space);
  out.PutText(options.salt);
  out.PutText(options.device);
  // 0 is normal priority: what manifests had here before there were priorities.
  const auto priority = (static_cast<unsigned>(options.priority) + kPriorities - 1) % kPriorities;
  out.Put(static_cast<uint8_t>(static_cast<unsigned>(options.persistence) | priority << 4));
  out.Put(static_cast<uint8_t>(options.allow_drop));
}
absl::StatusOr<CachePair> GetPair(ManifestReader& in) {
  const std::string name = in.GetText();
  if (in.failed()) return absl::DataLossError("the manifest is cut off");
  const absl::StatusOr<CachePair> pair = ParseCachePair(name);
  if (pair.ok()) return pair;
  return absl::FailedPreconditionError(absl::StrCat("this build has no cache types ", name));
}
absl::StatusOr<SequenceOptions> GetOptions(ManifestReader& in, uint32_t version) {
  SequenceOptions options;
  KVTIDE_ASSIGN_OR_RETURN(options.pair, GetPair(in));
  const size_t pairs = in.GetCount(8);
  for (size_t i = 0; i < pairs; i++) {
    KVTIDE_ASSIGN_OR_RETURN(const CachePair pair, GetPair(in));
    options.group_pairs.push_back(pair);
  }
  options.exact_window.first_blocks =
      static_cast<decltype(options.exact_window.first_blocks)>(in.Get<int64_t>());
  options.exact_window.last_blocks =
      static_cast<decltype(options.exact_window.last_blocks)>(in.Get<int64_t>());
  options.centre = static_cast<Centre>(in.Get<uint8_t>());
  if (const auto equalise = in.Get<uint8_t>(); equalise > 0)
    options.equalise = static_cast<Equalise>(equalise - 1);
  options.rope_pairs = static_cast<RopePairs>(in.Get<uint8_t>());
  options.name_space = in.GetText();
  if (version >= 6) options.salt = in.GetText();
  options.device = in.GetText();
  const auto both = in.Get<uint8_t>();
  options.persistence = static_cast<Persistence>(both & 15u);
  if (both >> 4 >= kPriorities) return absl::DataLossError("the manifest's priority makes no sense");
  options.priority = static_cast<Priority>(((both >> 4) + 1u) % kPriorities);
  options.allow_drop = in.Get<uint8_t>() != 0;
  return options;
}

// Transforms stand in the model already: of a profile that has them only the hash is kept.
void PutProfile(ManifestWriter& out, const Profile& profile) {
  const bool of_model = !profile.k.empty() && !profile.k[0].transform.empty();
  out.Put(static_cast<uint8_t>(of_model));
  if (of_model) return out.Put(profile.hash);
  PutShape(out, profile.shape);
  for (const auto* side : {&profile.k, &profile.v}) {
    out.Put(uint64_t{side->size()});
    for (const HeadProfile& head : *side) {
      out.PutList(head.mean);
      out.PutList(head.gain);
    }
  }
  out.Put(profile.hash);
}
// An empty profile where it is of a model without transforms: Check finds it.
std::shared_ptr<const Profile> GetProfile(ManifestReader& in, const LayerGroupSpec& group) {
  auto profile = std::make_shared<Profile>();
  if (in.Get<uint8_t>() != 0) {
    if (CheckGroupShape(group.shape).ok())
      if (auto made = MakeCalibratedProfile(group.shape, group.key_means, group.key_transforms); made.ok())
        *profile = *std::move(made);
    if (in.Get<uint64_t>() != profile->hash) profile->hash = 0;
    return profile;
  }
  profile->shape = GetShape(in);
  for (auto* side : {&profile->k, &profile->v}) {
    side->resize(in.GetCount(16));
    for (HeadProfile& head : *side) {
      head.mean = in.GetList<float>();
      head.gain = in.GetList<float>();
    }
  }
  in.Get(&profile->hash);
  return profile;
}

void PutGroup(ManifestWriter& out, const ManifestGroup& group) {
  out.PutText(group.pair);
  out.Put(group.codec_version_k);
  out.Put(group.codec_version_v);
  out.Put(group.exact_layout);
  out.Put(group.coded_layout);
  out.Put(group.first_block);
  out.Put(group.sealed);
  out.Put(uint64_t{group.layers.size()});
  for (const LayerProgress& layer : group.layers) {
    out.Put(layer.tokens);
    out.Put(layer.last_start);
    out.Put(layer.last_hash);
  }
  out.Put(group.profile);
  out.Put(uint64_t{group.profiles.size()});
  for (const auto& profile : group.profiles) PutProfile(out, *profile);
  out.Put(uint64_t{group.blocks.size()});
  for (const ManifestBlock& block : group.blocks) {
    out.Put(block.offset);
    out.Put(block.write_id);
    out.Put(block.checksum);
    out.Put(block.writer);
    out.Put(block.profile);
    out.Put(block.form);
  }
}
ManifestGroup GetGroup(ManifestReader& in, const LayerGroupSpec& spec) {
  ManifestGroup group;
  group.pair = in.GetText();
  in.Get(&group.codec_version_k);
  in.Get(&group.codec_version_v);
  in.Get(&group.exact_layout);
  in.Get(&group.coded_layout);
  in.Get(&group.first_block);
  in.Get(&group.sealed);
  group.layers.resize(in.GetCount(24));
  for (LayerProgress& layer : group.layers) {
    in.Get(&layer.tokens);
    in.Get(&layer.last_start);
    in.Get(&layer.last_hash);
  }
  in.Get(&group.profile);
  const size_t profiles = in.GetCount(9);
  for (size_t i = 0; i < profiles; i++) group.profiles.push_back(GetProfile(in, spec));
  group.blocks.resize(in.GetCount(40));
  for (ManifestBlock& block : group.blocks) {
    in.Get(&block.offset);
    in.Get(&block.write_id);
    in.Get(&block.checksum);
    in.Get(&block.writer);
    in.Get(&block.profile);
    block.form = in.Get<uint32_t>();
  }
  return group;
}

// What blocks may be recoded as.
void PutLadders(ManifestWriter& out, const Manifest& manifest) {
  out.Put(uint64_t{manifest.options.degrade.size()});
  for (const CachePair& pair : manifest.options.degrade) out.PutText(PairName(pair));
  for (const ManifestGroup& group : manifest.groups) {
    out.Put(uint64_t{group.rungs.size()});
    for (const ManifestRung& rung : group.rungs) {
      out.PutText(rung.pair);
      out.Put(rung.codec_version_k);
      out.Put(rung.codec_version_v);
      out.Put(rung.layout);
    }
  }
}
absl::Status GetLadders(ManifestReader& in, Manifest* manifest) {
  const size_t pairs = in.GetCount(8);
  for (size_t i = 0; i < pairs; i++) {
    KVTIDE_ASSIGN_OR_RETURN(const CachePair pair, GetPair(in));
    manifest->options.degrade.push_back(pair);
  }
  for (ManifestGroup& group : manifest->groups) {
    group.rungs.resize(in.GetCount(24));
    for (ManifestRung& rung : group.rungs) {
      rung.pair = in.GetText();
      in.Get(&rung.codec_version_k);
      in.Get(&rung.codec_version_v);
      in.Get(&rung.layout);
    }
  }
  return absl::OkStatus();
}

// A side without a profile (values beside calibrated means of keys) has no heads.
bool IsWhole(const Profile& profile, const GroupShape& shape) {
  const size_t heads = static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads);
  const auto is_side = [&](const std::vector<HeadProfile>& side) {
    return side.empty() || side.size() == heads;
  };
  return profile.shape == shape && is_side(profile.k) && is_side(profile.v) &&
         profile.hash == HashProfile(profile);
}

// What later code relies on.
absl::Status Check(const Manifest& manifest) {
  const auto damaged = [](const char* what) {
    return absl::DataLossError(absl::StrCat("the manifest's ", what, " make no sense"));
  };
  for (size_t g = 0; g < manifest.groups.size(); g++) {
    const ManifestGroup& group = manifest.groups[g];
    const GroupShape& shape = manifest.model.groups[g].shape;
    if (group.layers.size() != static_cast<size_t>(shape.layers)) return damaged("layers");
    int64_t most = 0;
    for (const LayerProgress& layer : group.layers) {
      if (layer.tokens < 0 || layer.tokens >= int64_t{1} << 48) return damaged("lengths");
      most = std::max(most, layer.tokens);
    }
    const int64_t end = (most + kBlockTokens - 1) / kBlockTokens;
    if (group.first_block < 0 || group.first_block + static_cast<int64_t>(group.blocks.size()) != end ||
        group.sealed < 0)
      return damaged("blocks");
    const auto is_profile = [&](int32_t index) {
      return index >= -1 && index < static_cast<int32_t>(group.profiles.size());
    };
    if (!is_profile(group.profile)) return damaged("profiles");
    for (const ManifestBlock& block : group.blocks)
      if (!is_profile(block.profile)) return damaged("profiles");
    for (const ManifestBlock& block : group.blocks)
      if (block.form >= ManifestBlock::kRungs + group.rungs.size()) return damaged("forms of blocks");
    if (manifest.closed && static_cast<int64_t>(manifest.chain_keys.size()) < end) return damaged("tokens");
    for (const auto& profile : group.profiles)
      if (!IsWhole(*profile, shape)) return damaged("profiles");
  }
  return absl::OkStatus();
}

}  // namespace

std::string EncodeManifest(const Manifest& manifest) {
  ManifestWriter out;
  out.Put(kVersion);
  out.Put(static_cast<uint8_t>(manifest.closed));
  out.Put(manifest.written_unix_nanos);
  out.Put(manifest.id);
  out.Put(manifest.forked_from);
  out.Put(manifest.created_unix_nanos);
  out.PutText(manifest.device);
  PutModel(out, manifest.model);
  out.PutText(manifest.model_tenant);
  PutOptions(out, manifest.options);
  out.Put(uint64_t{manifest.groups.size()});
  for (const ManifestGroup& group : manifest.groups) PutGroup(out, group);
  out.Put(manifest.chain_seed);
  out.Put(uint64_t{manifest.chain_keys.size()});
  for (const BlockKey& key : manifest.chain_keys) {
    out.Put(key.low);
    out.Put(key.high);
  }
  out.PutList(manifest.chain_rest);
  out.Put(manifest.model_revision);
  PutLadders(out, manifest);
  return out.Take();
}

bool IsClosedManifest(const std::string& bytes, int64_t* written_unix_nanos) {
  ManifestReader in(bytes);
  const bool closed = in.Get<uint32_t>() >= 6 && in.Get<uint8_t>() != 0;
  *written_unix_nanos = closed ? in.Get<int64_t>() : 0;
  return closed && !in.failed();
}

absl::StatusOr<Manifest> DecodeManifest(const std::string& bytes) {
  ManifestReader in(bytes);
  const auto version = in.Get<uint32_t>();
  if (version < kOldest || version > kVersion)
    return absl::FailedPreconditionError(
        absl::StrCat("the manifest has version ", version, ", this build reads ", kOldest, " to ", kVersion));
  Manifest manifest;
  if (version >= 6) {
    manifest.closed = in.Get<uint8_t>() != 0;
    in.Get(&manifest.written_unix_nanos);
  }
  in.Get(&manifest.id);
  in.Get(&manifest.forked_from);
  in.Get(&manifest.created_unix_nanos);
  manifest.device = in.GetText();
  manifest.model = GetModel(in);
  manifest.model_tenant = in.GetText();
  KVTIDE_ASSIGN_OR_RETURN(manifest.options, GetOptions(in, version));
  const size_t groups = in.GetCount(80);
  if (groups != manifest.model.groups.size())
    return absl::DataLossError("the manifest's layer groups make no sense");
  for (const LayerGroupSpec& spec : manifest.model.groups) manifest.groups.push_back(GetGroup(in, spec));
  if (version >= 6) {
    in.Get(&manifest.chain_seed);
    manifest.chain_keys.resize(in.GetCount(sizeof(BlockKey)));
    for (BlockKey& key : manifest.chain_keys) {
      in.Get(&key.low);
      in.Get(&key.high);
    }
    manifest.chain_rest = in.GetList<TokenId>();
  }
  if (version >= 7) in.Get(&manifest.model_revision);
  if (version >= 8) KVTIDE_RETURN_IF_ERROR(GetLadders(in, &manifest));
  if (in.failed() || !in.at_end()) return absl::DataLossError("the manifest is cut off or too long");
  KVTIDE_RETURN_IF_ERROR(Check(manifest));
  return manifest;
}

std::string EncodeProfile(const Profile& profile) {
  ManifestWriter out;
  PutProfile(out, profile);
  return out.Take();
}

absl::StatusOr<std::shared_ptr<const Profile>> DecodeProfile(const std::string& bytes,
                                                             const LayerGroupSpec& group) {
  ManifestReader in(bytes);
  std::shared_ptr<const Profile> profile = GetProfile(in, group);
  if (in.failed() || !in.at_end() || !IsWhole(*profile, group.shape))
    return absl::DataLossError("the profile is cut off, too long or of another shape");
  return profile;
}

}  // namespace kvtide
