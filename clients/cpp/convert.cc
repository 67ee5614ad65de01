#include "clients/cpp/convert.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "proto/data_type.h"

namespace kvtide::client {
namespace {

void ToProto(const ExactWindow& window, v1::ExactWindow* proto) {
  proto->set_first_blocks(window.first_blocks);
  proto->set_last_blocks(window.last_blocks);
}

ExactWindow FromProto(const v1::ExactWindow& proto) { return {proto.first_blocks(), proto.last_blocks()}; }

PlanVerdict FromProto(v1::PlanVerdict verdict) {
  switch (verdict) {
    case v1::PLAN_VERDICT_FITS:
      return PlanVerdict::kFits;
    case v1::PLAN_VERDICT_FITS_WITH_TIERS:
      return PlanVerdict::kFitsWithTiers;
    default:
      return PlanVerdict::kDoesNotFit;
  }
}

absl::Status CopyFloats(const v1::Tensor& tensor, std::span<float> target, const char* what) {
  if (tensor.dtype() != v1::DATA_TYPE_F32)
    return absl::InternalError(absl::StrCat(what, " of the answer is not f32"));
  if (tensor.data().size() != target.size_bytes()) {
    return absl::InvalidArgumentError(absl::StrCat(what, " holds ", tensor.data().size() / sizeof(float),
                                                   " values, but the memory given for it holds ",
                                                   target.size()));
  }
  std::memcpy(target.data(), tensor.data().data(), target.size_bytes());
  return absl::OkStatus();
}

}  // namespace

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

void ToProto(const TensorRef& tensor, v1::Tensor* proto) {
  proto->set_dtype(DataTypeToProto(tensor.type));
  size_t bytes = DataTypeBytes(tensor.type);
  for (int64_t dimension : tensor.shape) {
    proto->add_shape(dimension);
    bytes *= static_cast<size_t>(std::max<int64_t>(0, dimension));
  }
  proto->set_data(tensor.data, bytes);
}

void ToProto(const ModelRope& rope, v1::Rope* proto) {
  proto->set_frequencies(rope.frequencies.data(), rope.frequencies.size() * sizeof(float));
  proto->set_neighbours(rope.neighbours);
}

void ToProto(const Model& model, v1::Model* proto) {
  proto->set_name(model.name);
  for (const ModelLayer& layer : model.layers) {
    v1::Layer* out = proto->add_layers();
    out->set_kv_heads(layer.kv_heads);
    out->set_head_dim_k(layer.head_dim_k);
    out->set_head_dim_v(layer.head_dim_v);
    out->set_window(layer.window);
    out->set_query_heads(layer.query_heads);
    out->set_scale(layer.scale);
    out->set_softcap(layer.softcap);
    out->set_key_mean(layer.key_mean.data(), layer.key_mean.size() * sizeof(float));
    out->set_key_transform(layer.key_transform.data(), layer.key_transform.size() * sizeof(float));
    out->set_key_widths(layer.key_widths.data(), layer.key_widths.size());
    out->set_key_centre(layer.key_centre.data(), layer.key_centre.size() * sizeof(float));
    out->set_key_frequencies(layer.key_frequencies.data(), layer.key_frequencies.size() * sizeof(float));
    out->set_key_rope_neighbours(layer.key_rope_neighbours);
    if (layer.rope.has_value()) ToProto(*layer.rope, out->mutable_rope());
  }
}

Model FromProto(const v1::Model& proto) {
  const auto values = [](const std::string& bytes, auto* out) {
    using Value = typename std::decay_t<decltype(*out)>::value_type;
    out->resize(bytes.size() / sizeof(Value));
    if (!bytes.empty()) std::memcpy(out->data(), bytes.data(), out->size() * sizeof(Value));
  };
  Model model{proto.name(), {}};
  for (const v1::Layer& from : proto.layers()) {
    ModelLayer& layer = model.layers.emplace_back();
    layer.kv_heads = from.kv_heads();
    layer.head_dim_k = from.head_dim_k();
    layer.head_dim_v = from.head_dim_v();
    layer.window = from.window();
    layer.query_heads = from.query_heads();
    layer.scale = from.scale();
    layer.softcap = from.softcap();
    values(from.key_mean(), &layer.key_mean);
    values(from.key_transform(), &layer.key_transform);
    values(from.key_widths(), &layer.key_widths);
    values(from.key_centre(), &layer.key_centre);
    values(from.key_frequencies(), &layer.key_frequencies);
    layer.key_rope_neighbours = from.key_rope_neighbours();
    if (!from.has_rope()) continue;
    values(from.rope().frequencies(), &layer.rope.emplace().frequencies);
    layer.rope->neighbours = from.rope().neighbours();
  }
  return model;
}

void ToProto(const SequenceOptions& options, v1::CreateSequenceRequest* proto) {
  proto->set_pair(options.pair);
  if (options.exact_window) ToProto(*options.exact_window, proto->mutable_exact_window());
  proto->set_seal_at_once(options.seal_at_once);
  proto->set_key_centring(static_cast<v1::KeyCentring>(options.key_centring));
  proto->set_key_equalising(static_cast<v1::KeyEqualising>(options.key_equalising));
  proto->set_rope_pairs(static_cast<v1::RopePairs>(options.rope_pairs));
  proto->set_persistence(static_cast<v1::Persistence>(options.persistence));
  proto->set_priority(static_cast<v1::Priority>(options.priority));
  proto->set_tenant(options.tenant);
  proto->set_device(options.device);
  proto->set_prefix_salt(options.prefix_salt);
  proto->set_allow_drop(options.allow_drop);
  for (const std::string& pair : options.group_pairs) proto->add_group_pairs(pair);
  for (const std::string& pair : options.degrade) proto->add_degrade(pair);
}
static_assert(static_cast<int>(KeyCentring::kFirstBlock) == v1::KEY_CENTRING_FIRST_BLOCK);
static_assert(static_cast<int>(KeyCentring::kCalibrated) == v1::KEY_CENTRING_CALIBRATED);
static_assert(static_cast<int>(KeyEqualising::kFull) == v1::KEY_EQUALISING_FULL);
static_assert(static_cast<int>(RopePairs::kNeighbours) == v1::ROPE_PAIRS_NEIGHBOURS);

void ToProto(const AttentionOptions& options, v1::AttentionOptions* proto) {
  if (options.scale) proto->set_scale(*options.scale);
  if (options.causal) proto->set_causal(*options.causal);
  if (options.window) proto->set_window(*options.window);
  if (options.softcap) proto->set_softcap(*options.softcap);
  proto->mutable_sinks()->Add(options.sinks.begin(), options.sinks.end());
}

void ToProto(const PlanQuestion& question, v1::PlanRequest* proto) {
  proto->set_model_name(question.model);
  proto->mutable_contexts()->Add(question.contexts.begin(), question.contexts.end());
  proto->set_concurrency(question.concurrency);
  proto->set_device_bytes(question.device_bytes);
  proto->set_weights_bytes(question.weights_bytes);
  proto->set_host_bytes(question.host_bytes);
  for (const std::string& pair : question.pairs) proto->add_pairs(pair);
  if (question.exact_window) ToProto(*question.exact_window, proto->mutable_exact_window());
  if (question.max_perplexity_increase_percent) {
    proto->set_max_perplexity_increase_percent(*question.max_perplexity_increase_percent);
  }
  if (question.margin_bytes) proto->set_margin_bytes(*question.margin_bytes);
  proto->set_key_centring(static_cast<v1::KeyCentring>(question.key_centring));
}

ServerInfo FromProto(const v1::GetServerInfoResponse& proto) {
  ServerInfo info;
  info.version = proto.version();
  info.block_tokens = proto.block_tokens();
  for (const v1::TierInfo& tier : proto.tiers()) {
    info.tiers.push_back(
        {tier.name(), tier.backend(), tier.capacity_bytes(), tier.device(), tier.io(), tier.durable()});
  }
  for (const v1::CacheTypeInfo& type : proto.cache_types()) {
    info.cache_types.push_back(
        {type.name(), type.bits(), type.group(), type.version(), type.bits_per_value()});
  }
  info.default_pair = proto.default_pair();
  info.default_exact_window = FromProto(proto.default_exact_window());
  info.models.assign(proto.models().begin(), proto.models().end());
  info.max_message_bytes = proto.limits().max_message_bytes();
  info.max_sequences = proto.limits().max_sequences();
  info.max_models = proto.limits().max_models();
  info.max_tokens = proto.limits().max_tokens();
  info.max_items = proto.limits().max_items();
  info.max_append_tokens = proto.limits().max_append_tokens();
  info.max_connections = proto.limits().max_connections();
  info.max_calls_per_connection = proto.limits().max_calls_per_connection();
  info.call_memory_bytes = proto.limits().call_memory_bytes();
  info.memory_overhead_bytes = proto.limits().memory_overhead_bytes();
  info.process_id = proto.process_id();
  info.uptime_seconds = proto.uptime_seconds();
  return info;
}

SequenceInfo FromProto(const v1::Sequence& proto) {
  SequenceInfo info;
  info.id = proto.sequence_id();
  info.forked_from = proto.forked_from();
  info.model = proto.model();
  info.pair = proto.pair();
  info.tenant = proto.tenant();
  info.tokens = proto.tokens();
  info.max_layer_tokens = proto.max_layer_tokens();
  for (const v1::TierShare& share : proto.tiers())
    info.tiers.push_back({share.tier(), share.blocks(), share.bytes(), share.device()});
  info.dropped_blocks = proto.dropped_blocks();
  info.shared_blocks = proto.shared_blocks();
  info.degraded_blocks = proto.degraded_blocks();
  info.degrade.assign(proto.degrade().begin(), proto.degrade().end());
  for (const v1::DegradedTokens& tokens : proto.degraded())
    info.degraded.push_back({tokens.layer_group(), tokens.first_token(), tokens.tokens(), tokens.pair()});
  info.exact_window = FromProto(proto.exact_window());
  info.seal_at_once = proto.seal_at_once();
  info.idle_seconds = proto.idle_seconds();
  info.age_seconds = proto.age_seconds();
  info.device = proto.device();
  info.durable = proto.durable();
  info.durable_tokens = proto.durable_tokens();
  info.pinned_seconds = proto.pinned_seconds();
  info.known_tokens = proto.known_tokens();
  info.reused_tokens = proto.reused_tokens();
  info.persistence = static_cast<Persistence>(proto.persistence());
  info.priority = static_cast<Priority>(proto.priority());
  return info;
}

ServerStats FromProto(const v1::GetStatsResponse& proto) {
  ServerStats stats;
  for (const v1::TierStats& tier : proto.tiers()) {
    TierStats out;
    out.name = tier.name();
    out.backend = tier.backend();
    out.device = tier.device();
    out.capacity_bytes = tier.capacity_bytes();
    out.used_bytes = tier.used_bytes();
    out.largest_free_bytes = tier.largest_free_bytes();
    out.blocks = tier.blocks();
    out.pinned_blocks = tier.pinned_blocks();
    for (const v1::PairStats& pair : tier.pairs())
      out.pairs.push_back({pair.pair(), pair.blocks(), pair.bytes()});
    out.demoted_blocks = tier.demoted_blocks();
    out.promoted_blocks = tier.promoted_blocks();
    out.dropped_blocks = tier.dropped_blocks();
    out.lost_blocks = tier.lost_blocks();
    out.io = tier.io();
    out.problem = tier.problem();
    out.read_bytes = tier.read_bytes();
    out.written_bytes = tier.written_bytes();
    out.read_errors = tier.read_errors();
    out.write_errors = tier.write_errors();
    out.checksum_errors = tier.checksum_errors();
    out.sync_errors = tier.sync_errors();
    out.prefix_hit_tokens = tier.prefix_hit_tokens();
    out.attended_in_place = tier.attended_in_place();
    out.promoted_first = tier.promoted_first();
    out.attend_bytes_per_second = tier.attend_bytes_per_second();
    out.promote_bytes_per_second = tier.promote_bytes_per_second();
    out.low_priority_blocks = tier.low_priority_blocks();
    out.high_priority_blocks = tier.high_priority_blocks();
    out.encrypted = tier.encrypted();
    out.degraded_blocks = tier.degraded_blocks();
    out.degraded_bytes = tier.degraded_bytes();
    stats.tiers.push_back(std::move(out));
  }
  if (proto.has_remote()) {
    const v1::RemoteStats& remote = proto.remote();
    RemoteStats& out = stats.remote.emplace();
    out.server = remote.server();
    out.problem = remote.problem();
    out.write_problem = remote.write_problem();
    out.hit_blocks = remote.hit_blocks();
    out.miss_blocks = remote.miss_blocks();
    out.read_blocks = remote.read_blocks();
    out.read_bytes = remote.read_bytes();
    out.written_blocks = remote.written_blocks();
    out.written_bytes = remote.written_bytes();
    out.present_blocks = remote.present_blocks();
    out.left_out_blocks = remote.left_out_blocks();
    out.damaged_blocks = remote.damaged_blocks();
    out.timeouts = remote.timeouts();
    out.errors = remote.errors();
    out.connects = remote.connects();
    out.queued_blocks = remote.queued_blocks();
    out.memory_limit_bytes = remote.memory_limit_bytes();
    out.memory_used_bytes = remote.memory_used_bytes();
    out.memory_policy = remote.memory_policy();
  }
  stats.models = proto.models();
  stats.sequences = proto.sequences();
  stats.tokens = proto.tokens();
  stats.shared_blocks = proto.shared_blocks();
  stats.stored_bytes = proto.stored_bytes();
  stats.f16_equivalent_bytes = proto.f16_equivalent_bytes();
  stats.bits_per_value = proto.bits_per_value();
  stats.uptime_seconds = proto.uptime_seconds();
  stats.sequences_created = proto.sequences_created();
  stats.sequences_closed = proto.sequences_closed();
  stats.appended_tokens = proto.appended_tokens();
  stats.sealed_blocks = proto.sealed_blocks();
  stats.deferred_seals = proto.deferred_seals();
  stats.failed_seals = proto.failed_seals();
  stats.copied_on_write_blocks = proto.copied_on_write_blocks();
  stats.window_freed_blocks = proto.window_freed_blocks();
  stats.evict_calls = proto.evict_calls();
  stats.prefetch_calls = proto.prefetch_calls();
  stats.moves = proto.moves();
  stats.failed_moves = proto.failed_moves();
  stats.moved_bytes = proto.moved_bytes();
  stats.dropped_blocks = proto.dropped_blocks();
  stats.attended_blocks = proto.attended_blocks();
  stats.attended_blocks_below_first_tier = proto.attended_blocks_below_first_tier();
  stats.checksum_failures = proto.checksum_failures();
  stats.exhausted = proto.exhausted();
  stats.lost_blocks = proto.lost_blocks();
  stats.persist_calls = proto.persist_calls();
  stats.persisted = proto.persisted();
  stats.failed_persists = proto.failed_persists();
  stats.persisted_bytes = proto.persisted_bytes();
  stats.durable_sequences = proto.durable_sequences();
  stats.compacted_blocks = proto.compacted_blocks();
  stats.compacted_bytes = proto.compacted_bytes();
  stats.prefix_blocks = proto.prefix_blocks();
  stats.prefix_alone_bytes = proto.prefix_alone_bytes();
  stats.durable_prefix_blocks = proto.durable_prefix_blocks();
  stats.prefix_lookups = proto.prefix_lookups();
  stats.prefix_miss_tokens = proto.prefix_miss_tokens();
  stats.prefix_reused_tokens = proto.prefix_reused_tokens();
  for (const v1::RefusedCalls& refused : proto.refused()) {
    stats.refused.emplace_back(refused.reason(), refused.calls());
    for (const v1::RefusedCalls::OfTenant& of : refused.tenants())
      stats.refused_tenants.push_back({of.tenant(), refused.reason(), of.calls()});
  }
  for (const v1::MethodStats& method : proto.methods()) {
    MethodStats& to = stats.methods.emplace_back();
    to.method = method.method();
    to.calls = method.calls();
    for (const v1::CodeCount& failed : method.failed()) to.failed.emplace_back(failed.code(), failed.calls());
    to.p50_seconds = method.p50_seconds();
    to.p99_seconds = method.p99_seconds();
  }
  for (const v1::WayStats& way : proto.ways())
    stats.ways.push_back(
        {way.way(), way.clients(), way.calls(), way.steps(), way.received_bytes(), way.sent_bytes()});
  for (const v1::ClientStats& client : proto.clients())
    stats.clients.push_back({client.name(), client.way(), client.tenant(), client.calls(), client.steps(),
                             client.received_bytes(), client.sent_bytes(), client.connected_seconds(),
                             client.idle_seconds()});
  for (const v1::MemoryUse& use : proto.memory())
    stats.memory.push_back({use.part(), use.predicted_bytes(), use.actual_bytes()});
  for (const v1::Trouble& trouble : proto.troubles())
    stats.troubles.push_back({trouble.what(), trouble.text(), trouble.seconds(), trouble.ends_service()});
  return stats;
}

PlanAnswer FromProto(const v1::PlanResponse& proto) {
  PlanAnswer answer;
  answer.verdict = FromProto(proto.verdict());
  answer.device_budget_bytes = proto.device_budget_bytes();
  for (const v1::ContextPlan& context : proto.contexts()) {
    ContextAnswer out;
    out.context = context.context();
    out.verdict = FromProto(context.verdict());
    out.chosen_pair = context.chosen_pair();
    out.reason = context.reason();
    out.split_pair = context.split_pair();
    out.split_device_bytes = context.split_device_bytes();
    out.split_host_bytes = context.split_host_bytes();
    for (const v1::PlanCandidate& candidate : context.candidates()) {
      PlanCandidate c;
      c.pair = candidate.pair();
      c.rejection = candidate.rejection();
      c.kv_bytes = candidate.kv_bytes();
      c.total_bytes = candidate.total_bytes();
      c.free_bytes = candidate.free_bytes();
      c.fits = candidate.fits();
      c.measured = candidate.measured();
      c.bits_per_value = candidate.bits_per_value();
      c.ratio_to_f16 = candidate.ratio_to_f16();
      c.perplexity_increase_percent = candidate.perplexity_increase_percent();
      c.max_context = candidate.max_context();
      c.max_concurrency = candidate.max_concurrency();
      c.measured_model = candidate.measured_model();
      c.measured_text = candidate.measured_text();
      c.measured_tokens = candidate.measured_tokens();
      c.calibrated = candidate.calibrated();
      out.candidates.push_back(std::move(c));
    }
    answer.contexts.push_back(std::move(out));
  }
  answer.assumptions.assign(proto.assumptions().begin(), proto.assumptions().end());
  answer.notes.assign(proto.notes().begin(), proto.notes().end());
  return answer;
}

absl::Status CopyResult(const v1::AttendResult& result, std::span<float> output, std::span<float> lse) {
  absl::Status status = CopyFloats(result.output(), output, "output");
  if (!status.ok() || lse.empty()) return status;
  return CopyFloats(result.lse(), lse, "lse");
}

absl::Status AppendRows(const v1::ReadTokensResponse& proto, std::vector<LayerRows>* rows) {
  if (proto.tokens() < 1 || (!rows->empty() && rows->size() != static_cast<size_t>(proto.layers_size())))
    return absl::InternalError("kvtided answered a read with other layers, or without tokens");
  rows->resize(static_cast<size_t>(proto.layers_size()));
  for (int i = 0; i < proto.layers_size(); i++) {
    const v1::LayerTokens& layer = proto.layers(i);
    LayerRows& out = (*rows)[static_cast<size_t>(i)];
    if (layer.k().shape_size() != 3 || layer.v().shape_size() != 3)
      return absl::InternalError("kvtided answered a read with tensors of another rank");
    out.layer = layer.layer();
    out.kv_heads = static_cast<int>(layer.k().shape(1));
    out.head_dim_k = static_cast<int>(layer.k().shape(2));
    out.head_dim_v = static_cast<int>(layer.v().shape(2));
    const auto add = [](const std::string& bytes, std::vector<std::byte>* to) {
      const auto* data = reinterpret_cast<const std::byte*>(bytes.data());
      to->insert(to->end(), data, data + bytes.size());
    };
    add(layer.k().data(), &out.k);
    add(layer.v().data(), &out.v);
  }
  return absl::OkStatus();
}

}  // namespace kvtide::client
