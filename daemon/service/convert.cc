#include "daemon/service/convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/tide.h"

namespace kvtide::service {
namespace {

// Longer ones meet gRPC's limit for headers (8 KiB).
constexpr size_t kMaxMessageText = 4096;

// Of a model; as the cache has them. Looked at before any work is done.
constexpr int kMostGroups = 64, kMostLayers = kMostGroups * 1024;

// Settings that layers of one group share; the count of layers is filled in later.
LayerGroupSpec GroupOf(const v1::Layer& layer) {
  LayerGroupSpec group;
  group.shape = {0, layer.kv_heads(), layer.head_dim_k(), layer.head_dim_v()};
  group.window = layer.window();
  group.heads = layer.query_heads();
  group.scale = layer.scale();
  group.softcap = layer.softcap();
  return group;
}

absl::Status CheckLayer(const v1::Layer& layer) {
  GroupShape shape{1, layer.kv_heads(), layer.head_dim_k(), layer.head_dim_v()};
  KVTIDE_RETURN_IF_ERROR(CheckGroupShape(shape));
  const size_t mean_bytes = sizeof(float) * static_cast<size_t>(shape.kv_heads * shape.head_dim_k);
  if (!layer.key_mean().empty() && layer.key_mean().size() != mean_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("key_mean has ", layer.key_mean().size(),
                                                   " bytes, expected ", mean_bytes,
                                                   " (f32 [kv_heads][head_dim_k]) or none"));
  }
  const auto check = [&](const char* field, const std::string& bytes, size_t wanted, const char* layout) {
    if (bytes.empty() || (bytes.size() == wanted && !layer.key_mean().empty())) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(field, " has ", bytes.size(), " bytes, expected ", wanted,
                                                   " (", layout, ") beside key_mean, or none"));
  };
  KVTIDE_RETURN_IF_ERROR(check("key_centre", layer.key_centre(), mean_bytes, "f32 [kv_heads][head_dim_k]"));
  KVTIDE_RETURN_IF_ERROR(check("key_transform", layer.key_transform(),
                               mean_bytes * static_cast<size_t>(shape.head_dim_k),
                               "f32 [kv_heads][head_dim_k][head_dim_k]"));
  const size_t groups = static_cast<size_t>(shape.kv_heads * StoredDim(shape.head_dim_k) / kTideGroup);
  const bool old = layer.key_widths().size() == kLeastTideTypes * groups;  // without tide1
  KVTIDE_RETURN_IF_ERROR(check("key_widths", layer.key_widths(),
                               groups * (old ? kLeastTideTypes : kTideTypes),
                               "[kv_heads][4 types][head_dim_k rounded up to 32, / 8]"));
  const bool transformed = !layer.key_transform().empty();
  if (transformed == layer.key_widths().empty() || transformed == layer.key_centre().empty())
    return absl::InvalidArgumentError(
        "key_transform, key_centre and key_widths come together, or not at all; a profile of before has no "
        "key_centre, make it anew with `kvtide calibrate`");
  const size_t pairs = layer.key_frequencies().size() / sizeof(float);
  if (layer.key_frequencies().size() % sizeof(float) != 0 || (pairs > 0 && !transformed) ||
      2 * pairs > static_cast<size_t>(shape.head_dim_k))
    return absl::InvalidArgumentError(
        absl::StrCat("key_frequencies has ", layer.key_frequencies().size(),
                     " bytes, expected f32 of at most head_dim_k / 2 pairs beside key_transform"));
  if (layer.window() < 0 || layer.window() > kMostWindow) {
    return absl::InvalidArgumentError(
        absl::StrCat("window is ", layer.window(), "; allowed are 0 to ", kMostWindow));
  }
  if (layer.query_heads() <= 0 || layer.query_heads() % layer.kv_heads() != 0) {
    return absl::InvalidArgumentError(absl::StrCat("query_heads is ", layer.query_heads(),
                                                   ", expected a multiple of kv_heads (", layer.kv_heads(),
                                                   ")"));
  }
  if (!std::isfinite(layer.scale())) return absl::InvalidArgumentError("scale is not finite");
  if (!std::isfinite(layer.softcap()) || layer.softcap() < 0) {
    return absl::InvalidArgumentError(absl::StrCat("softcap is ", layer.softcap()));
  }
  return absl::OkStatus();
}

// Little-endian values behind those that are there.
template <class T>
void Append(const std::string& bytes, std::vector<T>& values) {
  const size_t had = values.size();
  values.resize(had + bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(values.data() + had, bytes.data(), bytes.size());
}

absl::Status UnknownValue(const char* field, int value) {
  return absl::InvalidArgumentError(absl::StrCat(field, " ", value, " is unknown to this version"));
}

int64_t ToSigned(uint64_t value) {
  return static_cast<int64_t>(std::min<uint64_t>(value, std::numeric_limits<int64_t>::max()));
}

void SetRemote(const RemoteStats& stats, v1::RemoteStats* proto) {
  proto->set_server(stats.server);
  proto->set_problem(stats.problem);
  proto->set_write_problem(stats.write_problem);
  proto->set_hit_blocks(ToSigned(stats.hit_blocks));
  proto->set_miss_blocks(ToSigned(stats.miss_blocks));
  proto->set_read_blocks(ToSigned(stats.read_blocks));
  proto->set_read_bytes(ToSigned(stats.read_bytes));
  proto->set_written_blocks(ToSigned(stats.written_blocks));
  proto->set_written_bytes(ToSigned(stats.written_bytes));
  proto->set_present_blocks(ToSigned(stats.present_blocks));
  proto->set_left_out_blocks(ToSigned(stats.left_out_blocks));
  proto->set_damaged_blocks(ToSigned(stats.damaged_blocks));
  proto->set_timeouts(ToSigned(stats.timeouts));
  proto->set_errors(ToSigned(stats.errors));
  proto->set_connects(ToSigned(stats.connects));
  proto->set_queued_blocks(ToSigned(stats.queued_blocks));
  proto->set_memory_limit_bytes(ToSigned(stats.memory_limit_bytes));
  proto->set_memory_used_bytes(ToSigned(stats.memory_used_bytes));
  proto->set_memory_policy(stats.memory_policy);
}

}  // namespace

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(status.message());
  if (message.size() > kMaxMessageText) message.resize(kMaxMessageText);
  return grpc::Status(static_cast<grpc::StatusCode>(status.raw_code()), message);
}

absl::StatusOr<ModelSpec> FromProto(const v1::Model& proto) {
  ModelSpec spec;
  spec.name = proto.name();
  if (proto.layers_size() > kMostLayers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layers has ", proto.layers_size(), " entries, at most ", kMostLayers, " are allowed"));
  }
  for (int i = 0; i < proto.layers_size(); i++) {
    const v1::Layer& layer = proto.layers(i);
    KVTIDE_RETURN_IF_ERROR(Annotate(CheckLayer(layer), absl::StrCat("layers[", i, "]")));
    const LayerGroupSpec wanted = GroupOf(layer);
    auto group = std::find_if(spec.groups.begin(), spec.groups.end(), [&wanted](LayerGroupSpec candidate) {
      candidate.shape.layers = 0;
      candidate.key_means.clear();
      candidate.key_transforms = {};
      return candidate == wanted;
    });
    if (group == spec.groups.end()) {
      if (spec.groups.size() == kMostGroups) {
        return absl::InvalidArgumentError(
            absl::StrCat("layers[", i, "]: the layers before have ", kMostGroups,
                         " different shapes already, the most that a model may have"));
      }
      group = spec.groups.insert(group, wanted);
    }
    if (group->shape.layers > 0 && (group->key_means.empty() != layer.key_mean().empty() ||
                                    group->key_transforms.empty() != layer.key_transform().empty())) {
      return absl::InvalidArgumentError(
          absl::StrCat("layers[", i, "].",
                       group->key_means.empty() != layer.key_mean().empty() ? "key_mean" : "key_transform",
                       ": of layers with one shape all have it, or none"));
    }
    Append(layer.key_mean(), group->key_means);
    KeyTransforms& keys = group->key_transforms;
    const RopePairs pairs = layer.key_rope_neighbours() ? RopePairs::kNeighbours : RopePairs::kHalves;
    if (group->shape.layers > 0 && (pairs != keys.pairs || keys.frequencies.size() * sizeof(float) !=
                                                               layer.key_frequencies().size() *
                                                                   static_cast<size_t>(group->shape.layers)))
      return absl::InvalidArgumentError(absl::StrCat(
          "layers[", i, "].key_frequencies: of layers with one shape all have as many pairs, of one kind"));
    keys.pairs = pairs;
    Append(layer.key_frequencies(), keys.frequencies);
    Append(layer.key_centre(), keys.centres);
    Append(layer.key_transform(), keys.matrices);
    Append(layer.key_widths(), keys.widths);
    spec.layers.push_back({static_cast<int>(group - spec.groups.begin()), group->shape.layers});
    group->shape.layers++;
  }
  return spec;
}

namespace {

absl::StatusOr<Rope> FromProto(const v1::Rope& proto, int head_dim) {
  Rope rope{proto.neighbours() ? RopePairs::kNeighbours : RopePairs::kHalves, {}};
  if (proto.frequencies().size() % sizeof(float) != 0 ||
      2 * (proto.frequencies().size() / sizeof(float)) > static_cast<size_t>(head_dim))
    return absl::InvalidArgumentError(absl::StrCat("rope.frequencies has ", proto.frequencies().size(),
                                                   " bytes, expected f32 of at most ", head_dim / 2,
                                                   " pairs"));
  Append(proto.frequencies(), rope.frequencies);
  for (const float frequency : rope.frequencies)
    if (!(frequency >= 0 && frequency <= kMostFrequency))
      return absl::InvalidArgumentError(absl::StrCat("rope.frequencies has ", frequency,
                                                     " radians a position, must be 0 to ", kMostFrequency));
  return rope;
}

}  // namespace

absl::StatusOr<std::vector<Rope>> RopesFrom(const v1::Model& proto) {
  std::vector<Rope> ropes;
  for (int i = 0; i < proto.layers_size(); i++) {
    const v1::Layer& layer = proto.layers(i);
    if (layer.has_rope() != proto.layers(0).has_rope())
      return absl::InvalidArgumentError(
          absl::StrCat("layers[", i, "].rope: all layers of a model have it, or none"));
    if (!layer.has_rope()) continue;
    absl::StatusOr<Rope> rope = FromProto(layer.rope(), layer.head_dim_k());
    if (!rope.ok()) return Annotate(rope.status(), absl::StrCat("layers[", i, "]"));
    ropes.push_back(*std::move(rope));
  }
  return ropes;
}

absl::StatusOr<std::vector<Rope>> RopesFrom(const google::protobuf::RepeatedPtrField<v1::Rope>& proto,
                                            const ModelSpec& model) {
  std::vector<Rope> ropes;
  if (proto.empty()) return ropes;
  const size_t layers = model.layers.size();
  if (proto.size() != 1 && static_cast<size_t>(proto.size()) != layers)
    return absl::InvalidArgumentError(
        absl::StrCat("ropes has ", proto.size(), " entries, expected 1, or ", layers, " for the layers"));
  for (size_t l = 0; l < layers; l++) {
    const int entry = proto.size() == 1 ? 0 : static_cast<int>(l);
    const LayerGroupSpec& group = model.groups[static_cast<size_t>(model.layers[l].group)];
    absl::StatusOr<Rope> rope = FromProto(proto.Get(entry), group.shape.head_dim_k);
    if (!rope.ok()) return Annotate(rope.status(), absl::StrCat("ropes[", entry, "]"));
    ropes.push_back(*std::move(rope));
  }
  return ropes;
}

std::vector<Rope> RopesOf(const ModelSpec& model) {
  std::vector<Rope> ropes;
  for (const LayerSpec& layer : model.layers) {
    const LayerGroupSpec& group = model.groups[static_cast<size_t>(layer.group)];
    const std::vector<float>& all = group.key_transforms.frequencies;
    if (all.empty()) return {};
    const auto pairs = static_cast<std::ptrdiff_t>(all.size()) / group.shape.layers;
    const auto first = all.begin() + pairs * layer.layer_in_group;
    ropes.push_back({group.key_transforms.pairs, {first, first + pairs}});
  }
  return ropes;
}

void ToProto(const ModelSpec& spec, std::span<const Rope> ropes, v1::Model* proto) {
  proto->set_name(spec.name);
  for (size_t l = 0; l < spec.layers.size(); l++) {
    const LayerGroupSpec& group = spec.groups[static_cast<size_t>(spec.layers[l].group)];
    v1::Layer* const out = proto->add_layers();
    out->set_kv_heads(group.shape.kv_heads);
    out->set_head_dim_k(group.shape.head_dim_k);
    out->set_head_dim_v(group.shape.head_dim_v);
    out->set_window(group.window);
    out->set_query_heads(group.heads);
    out->set_scale(group.scale);
    out->set_softcap(group.softcap);
    // A layer's part of what the group has for all of its layers.
    const auto part = [&](const auto& values, std::string* bytes) {
      const size_t each = values.size() / static_cast<size_t>(group.shape.layers);
      using Value = typename std::decay_t<decltype(values)>::value_type;
      bytes->assign(reinterpret_cast<const char*>(values.data() +
                                                  each * static_cast<size_t>(spec.layers[l].layer_in_group)),
                    each * sizeof(Value));
    };
    const KeyTransforms& keys = group.key_transforms;
    part(group.key_means, out->mutable_key_mean());
    part(keys.matrices, out->mutable_key_transform());
    part(keys.widths, out->mutable_key_widths());
    part(keys.centres, out->mutable_key_centre());
    part(keys.frequencies, out->mutable_key_frequencies());
    out->set_key_rope_neighbours(keys.pairs == RopePairs::kNeighbours);
    if (ropes.empty()) continue;
    const std::vector<float>& frequencies = ropes[l].frequencies;
    out->mutable_rope()->set_frequencies(frequencies.data(), frequencies.size() * sizeof(float));
    out->mutable_rope()->set_neighbours(ropes[l].pairs == RopePairs::kNeighbours);
  }
}

void ToProto(const ModelSpec& spec, v1::RegisterModelResponse* proto) {
  for (size_t g = 0; g < spec.groups.size(); g++) {
    const LayerGroupSpec& group = spec.groups[g];
    v1::LayerGroup* out = proto->add_groups();
    for (size_t layer = 0; layer < spec.layers.size(); layer++) {
      if (spec.layers[layer].group == static_cast<int>(g)) out->add_layers(static_cast<int>(layer));
    }
    out->set_kv_heads(group.shape.kv_heads);
    out->set_head_dim_k(group.shape.head_dim_k);
    out->set_head_dim_v(group.shape.head_dim_v);
    out->set_window(group.window);
    out->set_exact_block_bytes(ToSigned(BlockLayout(group.shape, ExactPair()).block_bytes()));
  }
}

absl::StatusOr<double> LeaseSeconds(double asked) {
  constexpr double kDefault = 30, kMost = 600;
  if (!(asked <= kMost))
    return absl::InvalidArgumentError(absl::StrCat("lease_seconds is ", asked, ", must be at most ", kMost));
  return asked == 0 ? kDefault : asked;
}

absl::StatusOr<Priority> FromProto(v1::Priority proto, Priority unset) {
  switch (proto) {
    case v1::PRIORITY_UNSPECIFIED:
      return unset;
    case v1::PRIORITY_LOW:
      return Priority::kLow;
    case v1::PRIORITY_NORMAL:
      return Priority::kNormal;
    case v1::PRIORITY_HIGH:
      return Priority::kHigh;
    default:
      return UnknownValue("priority", proto);
  }
}

v1::Priority ToProto(Priority priority) {
  switch (priority) {
    case Priority::kLow:
      return v1::PRIORITY_LOW;
    case Priority::kHigh:
      return v1::PRIORITY_HIGH;
    case Priority::kNormal:
      break;
  }
  return v1::PRIORITY_NORMAL;
}

absl::StatusOr<SequenceOptions> FromProto(const v1::CreateSequenceRequest& proto,
                                          const SequenceDefaults& defaults) {
  SequenceOptions options;
  options.pair = defaults.pair;
  options.exact_window = defaults.exact_window;
  if (!proto.pair().empty()) {
    auto pair = ParseCachePair(proto.pair());
    if (!pair.ok()) return Annotate(pair.status(), "pair");
    options.pair = *pair;
  }
  for (int i = 0; i < proto.group_pairs_size(); i++) {
    auto pair = ParseCachePair(proto.group_pairs(i));
    if (!pair.ok()) return Annotate(pair.status(), absl::StrCat("group_pairs[", i, "]"));
    options.group_pairs.push_back(*pair);
  }
  for (int i = 0; i < proto.degrade_size(); i++) {
    auto pair = ParseCachePair(proto.degrade(i));
    if (!pair.ok()) return Annotate(pair.status(), absl::StrCat("degrade[", i, "]"));
    options.degrade.push_back(*pair);
  }
  if (proto.has_exact_window()) {
    KVTIDE_ASSIGN_OR_RETURN(options.exact_window, FromProto(proto.exact_window()));
  }
  options.seal_at_once = proto.seal_at_once();
  switch (proto.persistence()) {
    case v1::PERSISTENCE_UNSPECIFIED:
      // Evaluation mode keeps nothing.
      options.persistence = options.seal_at_once ? Persistence::kNone : defaults.persistence;
      break;
    case v1::PERSISTENCE_NONE:
      options.persistence = Persistence::kNone;
      break;
    case v1::PERSISTENCE_ON_PARK:
      options.persistence = Persistence::kOnPark;
      break;
    case v1::PERSISTENCE_ALL:
      options.persistence = Persistence::kAll;
      break;
    default:
      return UnknownValue("persistence", proto.persistence());
  }
  KVTIDE_ASSIGN_OR_RETURN(options.priority, FromProto(proto.priority(), Priority::kNormal));
  switch (proto.key_centring()) {
    case v1::KEY_CENTRING_UNSPECIFIED:
      options.centre = Centre::kTypeDefault;
      break;
    case v1::KEY_CENTRING_NONE:
      options.centre = Centre::kNone;
      break;
    case v1::KEY_CENTRING_FIRST_BLOCK:
      options.centre = Centre::kFirstBlock;
      break;
    case v1::KEY_CENTRING_CALIBRATED:
      options.centre = Centre::kCalibrated;
      break;
    default:
      return UnknownValue("key_centring", proto.key_centring());
  }
  switch (proto.key_equalising()) {
    case v1::KEY_EQUALISING_UNSPECIFIED:
      break;
    case v1::KEY_EQUALISING_NONE:
      options.equalise = Equalise::kNone;
      break;
    case v1::KEY_EQUALISING_ROOT:
      options.equalise = Equalise::kRoot;
      break;
    case v1::KEY_EQUALISING_FULL:
      options.equalise = Equalise::kFull;
      break;
    default:
      return UnknownValue("key_equalising", proto.key_equalising());
  }
  switch (proto.rope_pairs()) {
    case v1::ROPE_PAIRS_UNSPECIFIED:
      break;
    case v1::ROPE_PAIRS_NONE:
      options.rope_pairs = RopePairs::kNone;
      break;
    case v1::ROPE_PAIRS_HALVES:
      options.rope_pairs = RopePairs::kHalves;
      break;
    case v1::ROPE_PAIRS_NEIGHBOURS:
      options.rope_pairs = RopePairs::kNeighbours;
      break;
    default:
      return UnknownValue("rope_pairs", proto.rope_pairs());
  }
  if (proto.tenant().size() > 256) {
    return absl::InvalidArgumentError(
        absl::StrCat("tenant has ", proto.tenant().size(), " bytes, at most 256"));
  }
  options.name_space = proto.tenant();
  options.salt = proto.prefix_salt();
  options.device = proto.device();
  options.allow_drop = proto.allow_drop();
  return options;
}

absl::StatusOr<ExactWindow> FromProto(const v1::ExactWindow& proto) {
  constexpr int kMost = 1 << 20;  // blocks: 64 M tokens
  if (proto.first_blocks() < 0 || proto.last_blocks() < 0 || proto.first_blocks() > kMost ||
      proto.last_blocks() > kMost) {
    return absl::InvalidArgumentError(absl::StrCat("exact_window is ", proto.first_blocks(), " and ",
                                                   proto.last_blocks(), " blocks; allowed are 0 to ", kMost));
  }
  return ExactWindow{proto.first_blocks(), proto.last_blocks()};
}

void ToProto(const ExactWindow& window, v1::ExactWindow* proto) {
  proto->set_first_blocks(window.first_blocks);
  proto->set_last_blocks(window.last_blocks);
}

void ToProto(const SequenceInfo& info, const std::vector<TierOptions>& tiers, absl::Time now,
             v1::Sequence* proto) {
  proto->set_sequence_id(info.id);
  proto->set_model(info.model_name);
  proto->set_pair(PairName(info.options.pair));
  proto->set_tenant(info.options.name_space);
  proto->set_tokens(info.tokens);
  for (size_t t = 0; t < info.blocks_by_tier.size() && t < tiers.size(); t++) {
    v1::TierShare* share = proto->add_tiers();
    share->set_tier(tiers[t].name);
    share->set_device(tiers[t].Device());
    share->set_blocks(ToSigned(info.blocks_by_tier[t]));
    share->set_bytes(ToSigned(info.bytes_by_tier[t]));
  }
  proto->set_dropped_blocks(ToSigned(info.dropped_blocks));
  proto->set_shared_blocks(ToSigned(info.shared_blocks));
  proto->set_degraded_blocks(ToSigned(info.degraded_blocks));
  for (const CachePair& pair : info.options.degrade) proto->add_degrade(PairName(pair));
  for (const DegradedBlocks& blocks : info.degraded) {
    v1::DegradedTokens* const tokens = proto->add_degraded();
    tokens->set_layer_group(blocks.group);
    tokens->set_first_token(blocks.first * kBlockTokens);
    tokens->set_tokens((blocks.end - blocks.first) * kBlockTokens);
    tokens->set_pair(PairName(blocks.pair));
  }
  proto->set_idle_seconds(absl::ToDoubleSeconds(now - info.last_used));
  proto->set_age_seconds(absl::ToDoubleSeconds(now - info.created));
  proto->set_forked_from(info.forked_from);
  proto->set_max_layer_tokens(info.max_layer_tokens);
  ToProto(info.options.EffectiveWindow(), proto->mutable_exact_window());
  proto->set_seal_at_once(info.options.seal_at_once);
  proto->set_device(info.device);
  proto->set_durable(info.durable);
  proto->set_durable_tokens(info.durable_tokens);
  proto->set_pinned_seconds(std::max(0.0, absl::ToDoubleSeconds(info.pinned_until - now)));
  proto->set_known_tokens(info.known_tokens);
  proto->set_reused_tokens(info.reused_tokens);
  proto->set_priority(ToProto(info.options.priority));
  proto->set_persistence(info.options.persistence == Persistence::kAll      ? v1::PERSISTENCE_ALL
                         : info.options.persistence == Persistence::kOnPark ? v1::PERSISTENCE_ON_PARK
                                                                            : v1::PERSISTENCE_NONE);
}

void ToProto(const CacheStats& stats, v1::GetStatsResponse* proto) {
  for (const TierStats& tier : stats.tiers) {
    v1::TierStats* out = proto->add_tiers();
    out->set_name(tier.name);
    out->set_backend(tier.backend);
    out->set_device(tier.device);
    out->set_capacity_bytes(ToSigned(tier.capacity_bytes));
    out->set_used_bytes(ToSigned(tier.used_bytes));
    out->set_largest_free_bytes(ToSigned(tier.largest_free_extent_bytes));
    out->set_blocks(ToSigned(tier.blocks));
    out->set_pinned_blocks(ToSigned(tier.pinned_blocks));
    for (const auto& [name, pair] : tier.pairs) {
      v1::PairStats* out_pair = out->add_pairs();
      out_pair->set_pair(name);
      out_pair->set_blocks(ToSigned(pair.blocks));
      out_pair->set_bytes(ToSigned(pair.bytes));
    }
    out->set_demoted_blocks(ToSigned(tier.demoted_blocks));
    out->set_promoted_blocks(ToSigned(tier.promoted_blocks));
    out->set_dropped_blocks(ToSigned(tier.dropped_blocks));
    out->set_degraded_blocks(ToSigned(tier.degraded_blocks));
    out->set_degraded_bytes(ToSigned(tier.degraded_bytes));
    out->set_lost_blocks(ToSigned(tier.lost_blocks));
    out->set_prefix_hit_tokens(ToSigned(tier.prefix_hit_tokens));
    out->set_attended_in_place(ToSigned(tier.attended_in_place));
    out->set_promoted_first(ToSigned(tier.promoted_first));
    out->set_attend_bytes_per_second(tier.attend_rate);
    out->set_promote_bytes_per_second(tier.promote_rate);
    out->set_low_priority_blocks(ToSigned(tier.low_priority_blocks));
    out->set_high_priority_blocks(ToSigned(tier.high_priority_blocks));
    out->set_io(!tier.attends);
    out->set_problem(tier.io.problem);
    out->set_read_bytes(ToSigned(tier.io.read_bytes));
    out->set_written_bytes(ToSigned(tier.io.written_bytes));
    out->set_read_errors(ToSigned(tier.io.read_errors));
    out->set_write_errors(ToSigned(tier.io.write_errors));
    out->set_checksum_errors(ToSigned(tier.io.checksum_errors));
    out->set_sync_errors(ToSigned(tier.io.sync_errors));
    out->set_encrypted(tier.io.encrypted);
  }
  proto->set_models(ToSigned(stats.models));
  proto->set_sequences(ToSigned(stats.sequences));
  proto->set_tokens(ToSigned(stats.tokens));
  proto->set_shared_blocks(ToSigned(stats.shared_blocks));
  proto->set_stored_bytes(ToSigned(stats.stored_bytes));
  proto->set_f16_equivalent_bytes(ToSigned(stats.f16_equivalent_bytes));
  proto->set_bits_per_value(stats.bits_per_value);
  proto->set_sequences_created(ToSigned(stats.sequences_created));
  proto->set_sequences_closed(ToSigned(stats.sequences_closed));
  proto->set_appended_tokens(ToSigned(stats.appended_tokens));
  proto->set_sealed_blocks(ToSigned(stats.sealed_blocks));
  proto->set_deferred_seals(ToSigned(stats.deferred_seals));
  proto->set_failed_seals(ToSigned(stats.failed_seals));
  proto->set_copied_on_write_blocks(ToSigned(stats.copied_on_write_blocks));
  proto->set_window_freed_blocks(ToSigned(stats.window_freed_blocks));
  proto->set_evict_calls(ToSigned(stats.evict_calls));
  proto->set_prefetch_calls(ToSigned(stats.prefetch_calls));
  proto->set_moves(ToSigned(stats.moves));
  proto->set_failed_moves(ToSigned(stats.failed_moves));
  proto->set_moved_bytes(ToSigned(stats.moved_bytes));
  proto->set_dropped_blocks(ToSigned(stats.dropped_blocks));
  proto->set_attended_blocks(ToSigned(stats.attended_blocks));
  proto->set_attended_blocks_below_first_tier(ToSigned(stats.attended_blocks_below_tier0));
  proto->set_checksum_failures(ToSigned(stats.checksum_failures));
  proto->set_exhausted(ToSigned(stats.exhausted));
  proto->set_lost_blocks(ToSigned(stats.lost_blocks));
  proto->set_persist_calls(ToSigned(stats.persist_calls));
  proto->set_persisted(ToSigned(stats.persisted));
  proto->set_failed_persists(ToSigned(stats.failed_persists));
  proto->set_persisted_bytes(ToSigned(stats.persisted_bytes));
  proto->set_durable_sequences(ToSigned(stats.durable_sequences));
  proto->set_prefix_blocks(ToSigned(stats.prefix_blocks));
  proto->set_prefix_alone_bytes(ToSigned(stats.prefix_alone_bytes));
  proto->set_durable_prefix_blocks(ToSigned(stats.durable_prefix_blocks));
  proto->set_prefix_lookups(ToSigned(stats.prefix_lookups));
  proto->set_prefix_miss_tokens(ToSigned(stats.prefix_miss_tokens));
  proto->set_prefix_reused_tokens(ToSigned(stats.prefix_reused_tokens));
  proto->set_compacted_blocks(ToSigned(stats.compacted_blocks));
  proto->set_compacted_bytes(ToSigned(stats.compacted_bytes));
  if (stats.remote.has_value()) SetRemote(*stats.remote, proto->mutable_remote());
}

}  // namespace kvtide::service
