#include <cmath>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/cache_options.h"
#include "daemon/cache/call/model.h"
#include "daemon/cache/call/sequence_options.h"
#include "kernels/base/status.h"

namespace kvtide {

absl::Status CheckModelSpec(const ModelSpec& spec) {
  if (spec.name.empty() || spec.name.size() > 256)
    return absl::InvalidArgumentError("model name: must have 1 to 256 bytes");
  if (spec.groups.empty() || spec.groups.size() > 64)
    return absl::InvalidArgumentError(
        absl::StrCat("model '", spec.name, "': ", spec.groups.size(), " layer groups, must be 1 to 64"));
  if (spec.layers.size() > kMostModelLayers)
    return absl::InvalidArgumentError(absl::StrCat("model '", spec.name, "': ", spec.layers.size(),
                                                   " layers, must have at most ", kMostModelLayers));
  size_t layers = 0;
  for (size_t g = 0; g < spec.groups.size(); g++) {
    const LayerGroupSpec& group = spec.groups[g];
    const std::string where = absl::StrCat("model '", spec.name, "', layer group ", g);
    KVTIDE_RETURN_IF_ERROR(Annotate(CheckGroupShape(group.shape), where));
    if (group.heads < 1 || group.heads > 4096 || group.heads % group.shape.kv_heads != 0)
      return absl::InvalidArgumentError(absl::StrCat(where, ": ", group.heads,
                                                     " query heads, must be a multiple of the ",
                                                     group.shape.kv_heads, " KV heads and at most 4096"));
    if (group.window < 0)
      return absl::InvalidArgumentError(absl::StrCat(where, ": window ", group.window, " is negative"));
    if (!std::isfinite(group.scale) || group.scale < 0 || !std::isfinite(group.softcap) || group.softcap < 0)
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": scale and softcap must be finite and not negative"));
    const GroupShape& shape = group.shape;
    const size_t means = static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads) *
                         static_cast<size_t>(shape.head_dim_k);
    if (!group.key_means.empty() && group.key_means.size() != means)
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": ", group.key_means.size(), " means of keys, must be ", means, " or none"));
    for (const float mean : group.key_means)
      if (!(std::abs(mean) <= 65504.0f))
        return absl::InvalidArgumentError(
            absl::StrCat(where, ": a mean of keys is ", mean, ", must be finite and within +-65504"));
    const KeyTransforms& keys = group.key_transforms;
    if (keys.empty() != keys.widths.empty() || keys.empty() != keys.centres.empty() ||
        (keys.empty() ? !keys.frequencies.empty() : group.key_means.empty()))
      return absl::InvalidArgumentError(absl::StrCat(
          where, ": transforms of keys, their widths, RoPE and means come together, or not at all"));
    layers += static_cast<size_t>(group.shape.layers);
  }
  if (layers != spec.layers.size())
    return absl::InvalidArgumentError(absl::StrCat("model '", spec.name, "': ", spec.layers.size(),
                                                   " layers, but its groups have ", layers));
  std::vector<std::vector<bool>> seen(spec.groups.size());
  for (size_t g = 0; g < seen.size(); g++) seen[g].resize(static_cast<size_t>(spec.groups[g].shape.layers));
  for (size_t l = 0; l < spec.layers.size(); l++) {
    const LayerSpec& layer = spec.layers[l];
    if (layer.group < 0 || static_cast<size_t>(layer.group) >= seen.size() || layer.layer_in_group < 0 ||
        static_cast<size_t>(layer.layer_in_group) >= seen[static_cast<size_t>(layer.group)].size() ||
        seen[static_cast<size_t>(layer.group)][static_cast<size_t>(layer.layer_in_group)])
      return absl::InvalidArgumentError(absl::StrCat("model '", spec.name, "': layer ", l, " is in group ",
                                                     layer.group, " at ", layer.layer_in_group,
                                                     ", which does not exist or is taken"));
    seen[static_cast<size_t>(layer.group)][static_cast<size_t>(layer.layer_in_group)] = true;
  }
  return absl::OkStatus();
}

ModelSpec WithoutProfiles(ModelSpec spec) {
  for (LayerGroupSpec& group : spec.groups) {
    group.key_means.clear();
    group.key_transforms = {};
  }
  return spec;
}

ModelSpec UniformModel(std::string name, const GroupShape& shape, int heads) {
  ModelSpec spec;
  spec.name = std::move(name);
  LayerGroupSpec group;
  group.shape = shape;
  group.heads = heads;
  spec.groups.push_back(group);
  for (int l = 0; l < shape.layers; l++) spec.layers.push_back({0, l});
  return spec;
}

ProfileOptions ProfileOptionsFor(const SequenceOptions& options, CacheType key_type) {
  ProfileOptions profile;
  if (Info(key_type).storage == Storage::kHalf) return profile;
  // The model's profile, nothing is made.
  if (options.centre == Centre::kCalibrated || Info(key_type).calibrated) return profile;
  profile = DefaultProfileOptions(key_type, !options.seal_at_once);
  if (options.centre != Centre::kTypeDefault) profile.mean = options.centre == Centre::kFirstBlock;
  if (options.equalise.has_value()) profile.equalise = *options.equalise;
  profile.pairs = options.rope_pairs;
  return profile;
}

absl::Status CheckLadder(const GroupShape& shape, CachePair pair, std::span<const CachePair> degrade) {
  const size_t bytes = BlockLayout(shape, pair).block_bytes();
  bool any = false;
  for (size_t i = 0; i < degrade.size(); i++) {
    const CachePair rung = degrade[i];
    if (Info(rung.k).calibrated != Info(pair.k).calibrated)
      return absl::InvalidArgumentError(absl::StrCat(
          "degrade[", i, "]: keys that are stored as ", Name(pair.k), " cannot become ", Name(rung.k),
          Info(pair.k).calibrated ? "; name tide types of fewer bits"
                                  : ", which codes other values of them"));
    if (rung == ExactPair())
      return absl::InvalidArgumentError(absl::StrCat("degrade[", i, "]: f16 is not of fewer bits"));
    const size_t of_rung = BlockLayout(shape, rung).block_bytes();
    if (i > 0 && of_rung >= BlockLayout(shape, degrade[i - 1]).block_bytes())
      return absl::InvalidArgumentError(absl::StrCat(
          "degrade[", i, "]: ", PairName(rung), " takes ", of_rung, " bytes a block, not fewer than ",
          PairName(degrade[i - 1]), " before it; name the pairs from the most bits to the fewest"));
    any = any || of_rung < bytes;
  }
  if (!any && !degrade.empty())
    return absl::InvalidArgumentError(absl::StrCat("degrade: ", PairName(degrade.back()),
                                                   " takes no fewer bytes than ", PairName(pair),
                                                   ", which the blocks have; name pairs of fewer bits"));
  return absl::OkStatus();
}

namespace {

absl::Status CheckDegrade(const SequenceOptions& options, const ModelSpec& model) {
  if (options.degrade.empty()) return absl::OkStatus();
  if (options.seal_at_once)
    return absl::InvalidArgumentError("degrade: a sequence that codes at once (evaluation) keeps its bits");
  for (size_t g = 0; g < model.groups.size(); g++) {
    const CachePair pair = options.PairOfGroup(static_cast<int>(g));
    if (pair == ExactPair())
      return absl::InvalidArgumentError(
          absl::StrCat("degrade: blocks of layer group ", g,
                       " are never coded (f16); give the sequence a pair that codes"));
    for (const CachePair& rung : options.degrade)
      if (Info(rung.k).calibrated && Info(pair.k).calibrated &&
          !HasWidthsOf(rung.k, model.groups[g].shape, model.groups[g].key_transforms))
        return absl::InvalidArgumentError(
            absl::StrCat("degrade: the profile of model '", model.name, "' has no widths for ", Name(rung.k),
                         " in layer group ", g, "; make it anew with kvtide calibrate"));
    KVTIDE_RETURN_IF_ERROR(
        Annotate(CheckLadder(model.groups[g].shape, pair, options.degrade), absl::StrCat("layer group ", g)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckSequenceOptions(const SequenceOptions& options, const ModelSpec& model) {
  if (!options.group_pairs.empty() && options.group_pairs.size() != model.groups.size())
    return absl::InvalidArgumentError(absl::StrCat(options.group_pairs.size(), " pairs for the ",
                                                   model.groups.size(), " layer groups of model '",
                                                   model.name, "'"));
  if (options.exact_window.first_blocks < 0 || options.exact_window.last_blocks < 0)
    return absl::InvalidArgumentError(absl::StrCat("exact window of ", options.exact_window.first_blocks,
                                                   " first and ", options.exact_window.last_blocks,
                                                   " last blocks: must not be negative"));
  if (options.centre == Centre::kCalibrated)
    for (size_t g = 0; g < model.groups.size(); g++)
      if (model.groups[g].key_means.empty())
        return absl::InvalidArgumentError(
            absl::StrCat("model '", model.name, "' has no calibrated means of keys in layer group ", g,
                         "; register it with Layer.key_mean (kvtide calibrate makes them)"));
  for (size_t g = 0; g < model.groups.size(); g++) {
    const CacheType key_type = options.PairOfGroup(static_cast<int>(g)).k;
    if (Info(key_type).calibrated && model.groups[g].key_transforms.empty())
      return absl::InvalidArgumentError(absl::StrCat(
          "model '", model.name, "' has no transforms of keys in layer group ", g, ", which ", Name(key_type),
          " needs; register it with Layer.key_transform and its companions (kvtide calibrate makes them)"));
    if (Info(key_type).calibrated &&
        !HasWidthsOf(key_type, model.groups[g].shape, model.groups[g].key_transforms))
      return absl::InvalidArgumentError(
          absl::StrCat("model '", model.name, "': its profile is older than ", Name(key_type),
                       " and has no widths for it; make it anew with kvtide calibrate"));
  }
  KVTIDE_RETURN_IF_ERROR(CheckDegrade(options, model));
  if (options.name_space.size() > 256)
    return absl::InvalidArgumentError("namespace: must have at most 256 bytes");
  if (options.salt.size() > 256) return absl::InvalidArgumentError("salt: must have at most 256 bytes");
  return absl::OkStatus();
}

int CountHomes(const std::vector<TierOptions>& tiers) {
  int homes = 0;
  for (const TierOptions& tier : tiers)
    if (tier.name == tiers[0].name) homes++;
  return homes;
}

LiveLimits LiveLimitsOf(const CacheOptions& options) {
  return {options.limits.high_watermark, options.limits.low_watermark, options.max_sequences,
          options.max_models, options.quotas};
}

absl::Status CheckCacheOptions(const CacheOptions& options) {
  if (options.tiers.empty() || options.tiers.size() > 64)
    return absl::InvalidArgumentError(
        absl::StrCat(options.tiers.size(), " tiers, each device of the first one counted: must be 1 to 64"));
  for (size_t t = 0; t < options.tiers.size(); t++) {
    const TierOptions& tier = options.tiers[t];
    if ((tier.backend == nullptr) == (tier.io == nullptr))
      return absl::InvalidArgumentError(
          absl::StrCat("tier '", tier.name, "' has no backend and no I/O, or both: it needs one of them"));
    if (t == 0 && !tier.attends())
      return absl::InvalidArgumentError(
          absl::StrCat("tier '", tier.name, "' is the first one and cannot be attended in place"));
    if (tier.name.empty()) return absl::InvalidArgumentError(absl::StrCat("tier ", t, " has no name"));
    if (tier.capacity_bytes < 4096)
      return absl::InvalidArgumentError(
          absl::StrCat("tier '", tier.name, "': ", tier.capacity_bytes, " bytes, must have at least 4096"));
    for (size_t other = 0; other < t; other++) {
      if (options.tiers[other].name != tier.name) continue;
      if (tier.name != options.tiers[0].name || options.tiers[t - 1].name != tier.name)
        return absl::InvalidArgumentError(absl::StrCat("two tiers are called '", tier.name,
                                                       "': only the first tier may lie on several devices"));
      if (options.tiers[other].Device() == tier.Device())
        return absl::InvalidArgumentError(
            absl::StrCat("two tiers are called '", tier.name, "' on device '", tier.Device(), "'"));
    }
  }
  const TierLimits& limits = options.limits;
  if (!(limits.low_watermark >= 0 && limits.low_watermark <= limits.high_watermark &&
        limits.high_watermark <= 1 && limits.promote_below >= 0 && limits.promote_below <= 1))
    return absl::InvalidArgumentError("watermarks: need 0 <= low <= high <= 1 and 0 <= promote_below <= 1");
  if (options.max_models < 1 || options.max_sequences < 1 || options.max_tokens_per_sequence < 1 ||
      options.max_tokens_per_append < 1 || options.max_queries_per_item < 1 || options.max_batch_items < 1 ||
      options.max_moves_in_flight < 1 || options.max_attend_work < 1 || options.max_cached_plans < 1 ||
      options.max_namespaces < 1 || options.max_keyed_blocks < 1 || options.max_leases < 1)
    return absl::InvalidArgumentError("every limit must be at least 1");
  // Block numbers have 31 bits.
  if (options.max_tokens_per_sequence > int64_t{1} << 36)
    return absl::InvalidArgumentError("max_tokens_per_sequence must be at most 68,719,476,736");
  if (options.move_piece_bytes < 4096)
    return absl::InvalidArgumentError("move_piece_bytes must be at least 4096");
  if (options.room_wait < absl::ZeroDuration())
    return absl::InvalidArgumentError("room_wait must not be negative");
  if (!options.clock) return absl::InvalidArgumentError("no clock");
  return absl::OkStatus();
}

}  // namespace kvtide
