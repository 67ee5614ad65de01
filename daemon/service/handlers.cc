#include "daemon/service/handlers.h"

#include <unistd.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "daemon/service/troubles.h"
#include "kernels/base/status.h"

namespace kvtide::service {
namespace {

absl::Status CheckAdmin(const Call& call, const char* verb) {
  return call.context.identity == nullptr || call.context.identity->admin
             ? absl::OkStatus()
             : absl::PermissionDeniedError(absl::StrCat(
                   verb,
                   " is for admins: kvtided's own user and root, and whom --allow or --tokens name so"));
}

absl::Status NoConfig() {
  return absl::UnimplementedError("there is no configuration to read: this is no daemon of its own");
}

int64_t Signed(uint64_t value) { return static_cast<int64_t>(value); }

template <class Ids>
std::vector<SequenceId> ToVector(const Ids& ids) {
  return std::vector<SequenceId>(ids.begin(), ids.end());
}

}  // namespace

Handlers::Handlers(KvCache* cache, const ServiceOptions& options)
    : cache_(cache), options_(options), started_(cache->options().clock()) {}

absl::StatusOr<Handlers::SpecPointer> Handlers::SpecOfModel(ModelId model) {
  {
    const MutexLock lock(mutex_);
    if (const auto found = specs_.find(model); found != specs_.end()) return found->second;
  }
  KVTIDE_ASSIGN_OR_RETURN(ModelSpec spec, cache_->GetModel(model));
  auto shared = std::make_shared<const ModelSpec>(std::move(spec));
  const MutexLock lock(mutex_);
  return specs_.emplace(model, std::move(shared)).first->second;
}

absl::StatusOr<Handlers::SpecPointer> Handlers::SpecOfSequence(SequenceId sequence,
                                                               const CallContext& context) {
  KVTIDE_ASSIGN_OR_RETURN(const ModelId model, cache_->ModelOf(sequence, context));
  return SpecOfModel(model);
}

absl::StatusOr<const LayerGroupSpec*> Handlers::GroupOfLayer(const ModelSpec& spec, int layer) {
  if (layer < 0 || layer >= static_cast<int>(spec.layers.size())) {
    return absl::InvalidArgumentError(absl::StrCat("layer is ", layer, ", but model ", spec.name,
                                                   " has layers 0 to ", spec.layers.size() - 1));
  }
  return &spec.groups[static_cast<size_t>(spec.layers[static_cast<size_t>(layer)].group)];
}

absl::Status Handlers::GetServerInfo(const v1::GetServerInfoRequest&, v1::GetServerInfoResponse* response,
                                     const Call& call) {
  const CacheOptions& limits = cache_->options();
  response->set_version(options_.version);
  response->set_block_tokens(kBlockTokens);
  for (const TierOptions& tier : limits.tiers) {
    v1::TierInfo* out = response->add_tiers();
    out->set_name(tier.name);
    out->set_backend(tier.Medium());
    out->set_io(!tier.attends());
    out->set_durable(tier.index != nullptr);
    out->set_device(tier.Device());
    out->set_capacity_bytes(Signed(tier.capacity_bytes));
  }
  for (CacheType type : AllCacheTypes()) {
    const CacheTypeInfo& info = Info(type);
    v1::CacheTypeInfo* out = response->add_cache_types();
    out->set_name(info.name);
    out->set_bits(info.bits);
    out->set_group(info.group);
    out->set_version(info.version);
    out->set_bits_per_value(BlockLayout({1, 1, 128, 128}, {type, type}).BitsPerValue());
  }
  response->mutable_limits()->set_max_message_bytes(options_.max_message_bytes);
  const LiveLimits live = cache_->limits();
  response->mutable_limits()->set_max_sequences(Signed(live.max_sequences));
  response->mutable_limits()->set_max_models(Signed(live.max_models));
  response->mutable_limits()->set_max_tokens(limits.max_tokens_per_sequence);
  response->mutable_limits()->set_max_items(Signed(limits.max_batch_items));
  response->mutable_limits()->set_max_append_tokens(limits.max_tokens_per_append);
  response->mutable_limits()->set_max_connections(options_.gauges->connections_limit);
  response->mutable_limits()->set_max_calls_per_connection(options_.max_calls_per_connection);
  response->mutable_limits()->set_call_memory_bytes(options_.call_memory_bytes);
  response->mutable_limits()->set_memory_overhead_bytes(MemoryOverheadBytes(options_));
  response->set_default_pair(PairName(options_.defaults.pair));
  ToProto(options_.defaults.exact_window, response->mutable_default_exact_window());
  response->set_uptime_seconds(absl::ToDoubleSeconds(limits.clock() - started_));
  for (const std::string& model : cache_->ModelNames(call.context)) response->add_models(model);
  response->set_process_id(::getpid());
  return absl::OkStatus();
}

absl::Status Handlers::GetConfig(const v1::GetConfigRequest&, v1::GetConfigResponse* response,
                                 const Call& call) {
  KVTIDE_RETURN_IF_ERROR(CheckAdmin(call, "GetConfig"));
  if (!options_.config) return NoConfig();
  *response = options_.config();
  return absl::OkStatus();
}

absl::Status Handlers::ReloadConfig(const v1::ReloadConfigRequest&, v1::ReloadConfigResponse* response,
                                    const Call& call) {
  KVTIDE_RETURN_IF_ERROR(CheckAdmin(call, "ReloadConfig"));
  if (!options_.reload) return NoConfig();
  KVTIDE_ASSIGN_OR_RETURN(*response, options_.reload());
  return absl::OkStatus();
}

absl::Status Handlers::RegisterModel(const v1::RegisterModelRequest& request,
                                     v1::RegisterModelResponse* response, const Call& call) {
  auto spec = FromProto(request.model());
  if (!spec.ok()) return Annotate(spec.status(), "model");
  KVTIDE_RETURN_IF_ERROR(RopesFrom(request.model()).status());
  KVTIDE_ASSIGN_OR_RETURN(const ModelId model, cache_->RegisterModel(*spec, call.context));
  KVTIDE_RETURN_IF_ERROR(NoteModel(request.model(), model, call));
  ToProto(*spec, response);
  return absl::OkStatus();
}

absl::Status Handlers::UnregisterModel(const v1::UnregisterModelRequest& request,
                                       v1::UnregisterModelResponse*, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const ModelId model, cache_->FindModel(request.model(), call.context));
  KVTIDE_ASSIGN_OR_RETURN(const ModelId family, cache_->FamilyOf(model));
  KVTIDE_RETURN_IF_ERROR(cache_->UnregisterModel(request.model(), call.context).status());
  if (options_.calibrator != nullptr) options_.calibrator->Forget(family);
  const MutexLock lock(mutex_);
  // Those with installed profiles, too; what is another tenant's is asked for again.
  absl::erase_if(specs_, [&](const auto& entry) { return entry.second->name == request.model(); });
  return absl::OkStatus();
}

absl::Status Handlers::CreateSequence(const v1::CreateSequenceRequest& request,
                                      v1::CreateSequenceResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const SequenceOptions options, FromProto(request, options_.defaults));
  KVTIDE_ASSIGN_OR_RETURN(const ModelId model, cache_->FindModel(request.model(), call.context));
  KVTIDE_ASSIGN_OR_RETURN(const SequenceId sequence,
                          cache_->CreateSequence(model, options, call.context, request.prefix_lease()));
  response->set_sequence_id(sequence);
  response->set_pair(PairName(options.pair));
  if (const auto info = cache_->GetSequence(sequence, call.context); info.ok()) {
    response->set_device(info->device);
    response->set_tokens(info->tokens);
  }
  return absl::OkStatus();
}

absl::Status Handlers::LookupPrefix(const v1::LookupPrefixRequest& request,
                                    v1::LookupPrefixResponse* response, const Call& call) {
  PrefixCall lookup;
  auto options = FromProto(request.like(), options_.defaults);
  if (!options.ok()) return Annotate(options.status(), "like");
  lookup.options = *std::move(options);
  KVTIDE_ASSIGN_OR_RETURN(lookup.model, cache_->FindModel(request.like().model(), call.context));
  KVTIDE_ASSIGN_OR_RETURN(const double lease, LeaseSeconds(request.lease_seconds()));
  lookup.token_ids = {request.token_ids().data(), static_cast<size_t>(request.token_ids_size())};
  lookup.lease = request.peek() || lease < 0 ? absl::ZeroDuration() : absl::Seconds(lease);
  lookup.peek = request.peek();
  lookup.context = &call.context;
  KVTIDE_ASSIGN_OR_RETURN(const PrefixReport report, cache_->LookupPrefix(lookup));
  response->set_tokens(report.tokens);
  if (!request.peek()) {
    std::vector<std::pair<int, int64_t>> hits;
    for (const PrefixReport::Run& run : report.tiers) hits.emplace_back(run.tier, run.tokens);
    TellLookup(call, "tokens", hits, lookup.token_ids.size());
  }
  for (const PrefixReport::Run& run : report.tiers) {
    v1::PrefixTokens* const out = response->add_tiers();
    out->set_tier(cache_->options().tiers[static_cast<size_t>(run.tier)].name);
    out->set_tokens(run.tokens);
  }
  response->set_lease_id(report.lease);
  if (report.lease != 0) response->set_lease_seconds(lease);
  return absl::OkStatus();
}

absl::Status Handlers::ForkSequence(const v1::ForkSequenceRequest& request,
                                    v1::ForkSequenceResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const SequenceId fork, cache_->ForkSequence(request.sequence_id(), call.context));
  response->set_sequence_id(fork);
  return absl::OkStatus();
}

absl::Status Handlers::TruncateSequence(const v1::TruncateSequenceRequest& request,
                                        v1::TruncateSequenceResponse* response, const Call& call) {
  if (request.tokens() < 0) return absl::InvalidArgumentError(absl::StrCat("tokens is ", request.tokens()));
  KVTIDE_RETURN_IF_ERROR(cache_->TruncateSequence(request.sequence_id(), request.tokens(), call.context));
  KVTIDE_ASSIGN_OR_RETURN(const SequenceInfo info, cache_->GetSequence(request.sequence_id(), call.context));
  response->set_tokens(info.tokens);
  return absl::OkStatus();
}

absl::Status Handlers::CloseSequence(const v1::CloseSequenceRequest& request, v1::CloseSequenceResponse*,
                                     const Call& call) {
  return cache_->CloseSequence(request.sequence_id(), call.context);
}

void Handlers::Release(SequenceId sequence) {
  if (cache_->IsDurable(sequence)) return;  // it outlives its session
  // It may be closed already, by another client: then there is nothing to do.
  cache_->CloseSequence(sequence).IgnoreError();
}

namespace {

// Tier to move to: by name, or the one below the first.
absl::StatusOr<int> FindTier(const std::vector<TierOptions>& tiers, const std::string& name) {
  if (name.empty()) {
    const int below = CountHomes(tiers);
    if (below < static_cast<int>(tiers.size())) return below;
    return absl::FailedPreconditionError(
        "there is no lower tier to move to; start kvtided with --host-memory, or drop the blocks");
  }
  std::string known;
  for (size_t t = 0; t < tiers.size(); t++) {
    if (tiers[t].name == name) return static_cast<int>(t);
    if (t > 0 && tiers[t].name == tiers[t - 1].name) continue;  // another device of the same tier
    absl::StrAppend(&known, t == 0 ? "" : ", ", tiers[t].name);
  }
  return absl::InvalidArgumentError(absl::StrCat("unknown tier \"", name, "\"; known: ", known));
}

}  // namespace

absl::Status Handlers::EvictSequences(const v1::EvictSequencesRequest& request,
                                      v1::EvictSequencesResponse* response, const Call& call) {
  if (request.all() == (request.sequence_ids_size() > 0)) {
    return absl::InvalidArgumentError("give sequence_ids or all, one of the two");
  }
  if (request.drop() && !request.tier().empty()) {
    return absl::InvalidArgumentError("give tier or drop, not both");
  }
  int tier = kDropTier;
  if (!request.drop()) {
    KVTIDE_ASSIGN_OR_RETURN(tier, FindTier(cache_->options().tiers, request.tier()));
  }
  KVTIDE_ASSIGN_OR_RETURN(const MoveReport report,
                          request.all()
                              ? cache_->EvictAll(tier, call.context)
                              : cache_->Evict(ToVector(request.sequence_ids()), tier, call.context));
  response->set_blocks(Signed(report.moved_blocks));
  response->set_bytes(Signed(report.moved_bytes));
  response->set_dropped_blocks(Signed(report.dropped_blocks));
  response->set_blocks_left(Signed(report.left_blocks));
  response->set_shared_blocks(Signed(report.shared_blocks));
  response->set_degraded_blocks(Signed(report.degraded_blocks));
  return absl::OkStatus();
}

absl::Status Handlers::PrefetchSequences(const v1::PrefetchSequencesRequest& request,
                                         v1::PrefetchSequencesResponse* response, const Call& call) {
  if (request.sequence_ids_size() == 0) return absl::InvalidArgumentError("sequence_ids is empty");
  KVTIDE_ASSIGN_OR_RETURN(const MoveReport report,
                          cache_->Prefetch(ToVector(request.sequence_ids()), call.context));
  response->set_blocks(Signed(report.moved_blocks));
  response->set_bytes(Signed(report.moved_bytes));
  response->set_blocks_left(Signed(report.left_blocks));
  response->set_dropped_blocks(Signed(report.dropped_blocks));
  response->set_degraded_blocks(Signed(report.degraded_blocks));
  return absl::OkStatus();
}

absl::Status Handlers::PersistSequences(const v1::PersistSequencesRequest& request,
                                        v1::PersistSequencesResponse* response, const Call& call) {
  if (request.sequence_ids_size() == 0) return absl::InvalidArgumentError("sequence_ids is empty");
  KVTIDE_ASSIGN_OR_RETURN(const PersistReport report,
                          cache_->Persist(ToVector(request.sequence_ids()), call.context));
  response->set_sequences(Signed(report.sequences));
  response->set_blocks(Signed(report.blocks));
  response->set_bytes(Signed(report.bytes));
  response->set_tokens(report.tokens);
  return absl::OkStatus();
}

absl::Status Handlers::PinSequences(const v1::PinSequencesRequest& request, v1::PinSequencesResponse*,
                                    const Call& call) {
  if (request.sequence_ids_size() == 0) return absl::InvalidArgumentError("sequence_ids is empty");
  return cache_->Pin(ToVector(request.sequence_ids()), absl::Seconds(request.seconds()), call.context);
}

absl::Status Handlers::SetPriority(const v1::SetPriorityRequest& request, v1::SetPriorityResponse*,
                                   const Call& call) {
  if (request.sequence_ids_size() == 0) return absl::InvalidArgumentError("sequence_ids is empty");
  if (request.priority() == v1::PRIORITY_UNSPECIFIED)
    return absl::InvalidArgumentError("priority is not set; say low, normal or high");
  KVTIDE_ASSIGN_OR_RETURN(const Priority priority, FromProto(request.priority(), Priority::kNormal));
  return cache_->SetPriority(ToVector(request.sequence_ids()), priority, call.context);
}

absl::Status Handlers::ListSequences(const v1::ListSequencesRequest& request,
                                     v1::ListSequencesResponse* response, const Call& call) {
  constexpr int kDefaultPage = 100, kLargestPage = 1000;
  if (request.page_size() < 0)
    return absl::InvalidArgumentError(absl::StrCat("page_size is ", request.page_size()));
  if (request.sequence_ids_size() > kLargestPage)
    return absl::InvalidArgumentError(
        absl::StrCat(request.sequence_ids_size(), " sequence_ids: at most ", kLargestPage));
  if (request.sequence_ids_size() > 0) {
    for (const SequenceId id : request.sequence_ids()) {
      const absl::StatusOr<SequenceInfo> info = cache_->GetSequence(id, call.context);
      if (info.ok() && (request.model().empty() || info->model_name == request.model()))
        ToProto(*info, cache_->options().tiers, cache_->options().clock(), response->add_sequences());
    }
    return absl::OkStatus();
  }
  const size_t page = static_cast<size_t>(
      request.page_size() == 0 ? kDefaultPage : std::min(request.page_size(), kLargestPage));
  SequenceId after = 0;
  if (!request.page_token().empty() && !absl::SimpleAtoi(request.page_token(), &after)) {
    return absl::InvalidArgumentError("page_token is not one that ListSequences gave");
  }
  SequenceList list;
  list.after = after;
  list.limit = page + 1;  // one more tells that there is another page
  list.model = request.model();
  const std::vector<SequenceInfo> sequences = cache_->ListSequences(list, call.context);
  const absl::Time now = cache_->options().clock();
  for (size_t i = 0; i < std::min(page, sequences.size()); i++) {
    ToProto(sequences[i], cache_->options().tiers, now, response->add_sequences());
  }
  if (sequences.size() > page) response->set_next_page_token(absl::StrCat(sequences[page - 1].id));
  return absl::OkStatus();
}

absl::Status Handlers::GetStats(const v1::GetStatsRequest&, v1::GetStatsResponse* response,
                                const Call& call) {
  ToProto(cache_->Stats(), response);
  const Identity& caller =
      call.context.identity == nullptr ? Identity::OfThisProcess() : *call.context.identity;
  options_.counts->ToProto(caller, response);
  options_.clients->ToProto(caller, response);
  if (options_.troubles != nullptr) options_.troubles->ToProto(caller, absl::Now(), response);
  response->set_uptime_seconds(absl::ToDoubleSeconds(cache_->options().clock() - started_));
  if (!options_.memory) return absl::OkStatus();
  for (const MemoryUse& use : options_.memory()) {
    v1::MemoryUse* const out = response->add_memory();
    out->set_part(use.part);
    out->set_predicted_bytes(use.predicted_bytes);
    out->set_actual_bytes(use.actual_bytes);
  }
  return absl::OkStatus();
}

}  // namespace kvtide::service
