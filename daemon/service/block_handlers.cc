// The verbs of the block store.
#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/reuse/keyed_payload.h"
#include "daemon/service/convert.h"
#include "daemon/service/handlers.h"
#include "daemon/service/places_in_use.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"
#include "proto/data_type.h"

namespace kvtide::service {
namespace {

constexpr int64_t kFramingBytes = 128;  // of an answer beside its payload

int64_t Signed(uint64_t value) { return static_cast<int64_t>(value); }

absl::StatusOr<NamespaceSpec> FromProto(const v1::Namespace& proto, const CallContext& context) {
  NamespaceSpec spec;
  spec.model = proto.model();
  spec.block_tokens = proto.block_tokens();
  spec.salt = proto.salt();
  spec.tenant = context.tenant();
  if (proto.has_tensors()) {
    const v1::TensorBlocks& tensors = proto.tensors();
    spec.tensors = TensorContent{tensors.layers(), tensors.kv_heads(), tensors.head_dim_k(),
                                 tensors.head_dim_v(), ExactPair()};
    if (!tensors.pair().empty()) {
      auto pair = ParseCachePair(tensors.pair());
      if (!pair.ok()) return Annotate(pair.status(), "namespace.tensors.pair");
      spec.tensors->pair = *pair;
    }
  }
  for (int i = 0; i < proto.degrade_size(); i++) {
    auto pair = ParseCachePair(proto.degrade(i));
    if (!pair.ok()) return Annotate(pair.status(), absl::StrCat("namespace.degrade[", i, "]"));
    spec.degrade.push_back(*pair);
  }
  if (proto.has_opaque())
    spec.opaque = OpaqueContent{static_cast<uint64_t>(std::max<int64_t>(0, proto.opaque().block_bytes())),
                                proto.opaque().encoding()};
  return spec;
}

void ToProto(const NamespaceSpec& spec, v1::Namespace* proto) {
  proto->set_model(spec.model);
  proto->set_block_tokens(spec.block_tokens);
  proto->set_salt(spec.salt);
  for (const CachePair& pair : spec.degrade) proto->add_degrade(PairName(pair));
  if (spec.opaque.has_value()) {
    proto->mutable_opaque()->set_block_bytes(Signed(spec.opaque->block_bytes));
    proto->mutable_opaque()->set_encoding(spec.opaque->encoding);
    return;
  }
  v1::TensorBlocks* const tensors = proto->mutable_tensors();
  tensors->set_layers(spec.tensors->layers);
  tensors->set_kv_heads(spec.tensors->kv_heads);
  tensors->set_head_dim_k(spec.tensors->head_dim_k);
  tensors->set_head_dim_v(spec.tensors->head_dim_v);
  tensors->set_pair(PairName(spec.tensors->pair));
}

absl::StatusOr<PageLayout> FromProto(const v1::PageLayout& proto) {
  PageLayout layout;
  if (proto.dtype() != v1::DATA_TYPE_UNSPECIFIED) {
    auto type = DataTypeFromProto(proto.dtype());
    if (!type.ok()) return Annotate(type.status(), "layout.dtype");
    layout.type = *type;
  }
  switch (proto.order()) {
    case v1::PAGE_ORDER_UNSPECIFIED:
    case v1::PAGE_ORDER_NHD:
      layout.order = PageOrder::kNhd;
      break;
    case v1::PAGE_ORDER_HND:
      layout.order = PageOrder::kHnd;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("layout.order is ", proto.order(), ", which is no PageOrder"));
  }
  layout.block_stride = proto.block_stride();
  layout.layer_stride = proto.layer_stride();
  layout.value_offset = proto.value_offset();
  layout.token_stride_k = proto.token_stride_k();
  layout.token_stride_v = proto.token_stride_v();
  layout.head_stride_k = proto.head_stride_k();
  layout.head_stride_v = proto.head_stride_v();
  return layout;
}

// `opaque`: what is meant where the request does not say.
absl::StatusOr<BlockPayload> FromProto(v1::BlockForm form, bool opaque) {
  switch (form) {
    case v1::BLOCK_FORM_UNSPECIFIED:
      return opaque ? BlockPayload::kBytes : BlockPayload::kTensors;
    case v1::BLOCK_FORM_TENSORS:
      return BlockPayload::kTensors;
    case v1::BLOCK_FORM_BYTES:
      return BlockPayload::kBytes;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("form is ", static_cast<int>(form), ", which is no BlockForm"));
  }
}

std::span<const uint64_t> Ids(const google::protobuf::RepeatedField<uint64_t>& ids) {
  return {ids.data(), static_cast<size_t>(ids.size())};
}

template <class Keys>
std::vector<std::string_view> Views(const Keys& keys) {
  return std::vector<std::string_view>(keys.begin(), keys.end());
}

}  // namespace

absl::Status Handlers::OpenNamespace(const v1::OpenNamespaceRequest& request,
                                     v1::OpenNamespaceResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const NamespaceSpec spec, FromProto(request.namespace_(), call.context));
  const Persistence persistence =
      request.persistence() == v1::PERSISTENCE_ALL
          ? Persistence::kAll
          : (request.persistence() == v1::PERSISTENCE_UNSPECIFIED ? options_.defaults.persistence
                                                                  : Persistence::kNone);
  KVTIDE_ASSIGN_OR_RETURN(const Priority priority, FromProto(request.priority(), Priority::kNormal));
  KVTIDE_ASSIGN_OR_RETURN(const NamespaceInfo info, cache_->OpenNamespace(spec, persistence, priority));
  response->set_namespace_id(info.id);
  response->set_block_bytes(Signed(info.block_bytes));
  if (spec.tensors.has_value()) response->set_pair(PairName(spec.tensors->pair));
  response->set_codec_version_k(info.codec_version_k);
  response->set_codec_version_v(info.codec_version_v);
  response->set_existed(info.existed);
  return absl::OkStatus();
}

absl::Status Handlers::StoreBlocks(const v1::StoreBlocksRequest& request, v1::StoreBlocksResponse* response,
                                   const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const NamespaceInfo info,
                          cache_->GetNamespace(request.namespace_id(), call.context));
  const std::vector<std::string_view> keys = Views(request.keys());
  StoreCall store;
  store.name_space = request.namespace_id();
  store.keys = keys;
  KVTIDE_ASSIGN_OR_RETURN(store.form, FromProto(request.form(), info.spec.opaque.has_value()));
  KVTIDE_ASSIGN_OR_RETURN(store.layout, FromProto(request.layout()));
  store.payload = std::as_bytes(std::span(request.data().data(), request.data().size()));
  if (request.has_place()) {
    if (!request.data().empty()) return absl::InvalidArgumentError("both data and place are set");
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const at, TensorMemory::Find(call.tensors, request.place(),
                                                                    request.place().bytes(), "place"));
    store.payload = {at, request.place().bytes()};
  }
  // Rows are coded by way of one block in f16.
  if (store.form == BlockPayload::kTensors && info.spec.tensors.has_value() && call.memory != nullptr)
    KVTIDE_RETURN_IF_ERROR(
        call.memory->Add(Signed(BlockLayout(info.spec.stored_shape(), ExactPair()).block_bytes())));
  if (request.priority() != v1::PRIORITY_UNSPECIFIED) {
    KVTIDE_ASSIGN_OR_RETURN(store.priority, FromProto(request.priority(), Priority::kNormal));
  }
  store.context = &call.context;
  KVTIDE_ASSIGN_OR_RETURN(const StoreReport report, cache_->StoreBlocks(store));
  response->set_stored(Signed(report.stored));
  response->set_present(Signed(report.present));
  response->set_left_out(Signed(report.left_out));
  response->set_problem(report.problem);
  return absl::OkStatus();
}

absl::Status Handlers::LookupBlocks(const v1::LookupBlocksRequest& request,
                                    v1::LookupBlocksResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const double asked, LeaseSeconds(request.lease_seconds()));
  const std::vector<std::string_view> keys = Views(request.keys());
  LookupCall lookup;
  lookup.name_space = request.namespace_id();
  lookup.keys = keys;
  lookup.lease = request.peek() || asked < 0 ? absl::ZeroDuration() : absl::Seconds(asked);
  lookup.peek = request.peek();
  lookup.context = &call.context;
  KVTIDE_ASSIGN_OR_RETURN(const LookupReport report, cache_->LookupBlocks(lookup));
  if (!request.peek()) TellLookup(call, "blocks", report.tiers, keys.size());
  response->set_hits(Signed(report.hits));
  for (const LookupReport::Hits& hits : report.tiers) {
    v1::BlockHits* const out = response->add_tiers();
    out->set_tier(cache_->options().tiers[static_cast<size_t>(hits.tier)].name);
    out->set_blocks(Signed(hits.blocks));
  }
  response->mutable_degraded_blocks()->Assign(report.degraded.begin(), report.degraded.end());
  response->set_lease_id(report.lease);
  if (report.lease != 0) response->set_lease_seconds(asked);
  return absl::OkStatus();
}

void Handlers::GiveBack(std::span<const uint64_t> places, const Call& call) {
  if (call.places == nullptr) return;
  for (const PlacesId id : places)
    if (call.places->Take(id)) cache_->ReleasePlaces(id);
}

void Handlers::EndPlaces(PlacesInUse* places) {
  for (const PlacesId id : places->TakeAll()) cache_->ReleasePlaces(id);
}

absl::Status Handlers::LoadBlocks(const v1::LoadBlocksRequest& request, v1::LoadBlocksResponse* response,
                                  const Call& call) {
  GiveBack(Ids(request.done_places()), call);
  KVTIDE_ASSIGN_OR_RETURN(const LeaseInfo lease, cache_->DescribeLease(request.lease_id(), call.context));
  const int64_t held = Signed(lease.blocks), first = request.first_block();
  if (first < 0 || request.blocks() < 0 || first > held || request.blocks() > held - first)
    return absl::OutOfRangeError(absl::StrCat("first_block is ", first, " and blocks is ", request.blocks(),
                                              ", the lease has ", held, " blocks"));
  const int64_t blocks = request.blocks() == 0 ? held - first : request.blocks();
  LoadCall load;
  load.lease = request.lease_id();
  load.first = static_cast<uint64_t>(first);
  load.blocks = static_cast<uint64_t>(blocks);
  KVTIDE_ASSIGN_OR_RETURN(load.form, FromProto(request.form(), lease.spec.opaque.has_value()));
  KVTIDE_ASSIGN_OR_RETURN(load.layout, FromProto(request.layout()));
  load.allow_lost = request.allow_lost();
  load.context = &call.context;
  if (request.in_place()) {
    if (request.has_place() || request.has_layout())
      return absl::InvalidArgumentError("blocks are read in place as they rest: neither place nor layout");
    if (call.places == nullptr)
      return absl::FailedPreconditionError(
          "this client has not mapped the tier of host memory (kvtided --host-sharing, by shared memory)");
    load.in_place = call.places->tier();
    KVTIDE_ASSIGN_OR_RETURN(const LoadReport report, cache_->LoadBlocks(load));
    if (report.places != 0) call.places->Add(report.places);
    response->set_blocks(blocks);
    response->mutable_lost_blocks()->Assign(report.lost.begin(), report.lost.end());
    response->mutable_offsets()->Assign(report.offsets.begin(), report.offsets.end());
    response->mutable_degraded_blocks()->Assign(report.degraded.begin(), report.degraded.end());
    response->set_places_id(report.places);
    return absl::OkStatus();
  }
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t bytes,
                          PayloadBytes(lease.spec, lease.block_bytes, load.form, load.layout, load.blocks));
  // Blocks of fewer bits are coded as the others by way of one block.
  if (load.form == BlockPayload::kBytes && !lease.spec.degrade.empty() && call.memory != nullptr)
    KVTIDE_RETURN_IF_ERROR(
        call.memory->Add(Signed(BlockLayout(lease.spec.stored_shape(), ExactPair()).block_bytes())));
  if (request.has_place()) {
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const at, TensorMemory::Find(call.tensors, request.place(),
                                                                    request.place().bytes(), "place"));
    load.payload = {at, request.place().bytes()};
  } else {
    const int64_t most = MostAnswerBytes(call, options_) - kFramingBytes;
    if (bytes > static_cast<uint64_t>(std::max<int64_t>(0, most)))
      return Refused(Refusal::kTooLarge, absl::ResourceExhaustedError(absl::StrCat(
                                             blocks, " blocks have ", bytes, " bytes, an answer holds ", most,
                                             "; load fewer at once, or into shared memory")));
    if (call.memory != nullptr) KVTIDE_RETURN_IF_ERROR(call.memory->Add(2 * Signed(bytes)));
    std::string* const data = response->mutable_data();
    data->resize(bytes);
    load.payload = std::as_writable_bytes(std::span(data->data(), data->size()));
  }
  KVTIDE_ASSIGN_OR_RETURN(const LoadReport report, cache_->LoadBlocks(load));
  response->set_blocks(blocks);
  response->mutable_lost_blocks()->Assign(report.lost.begin(), report.lost.end());
  response->mutable_degraded_blocks()->Assign(report.degraded.begin(), report.degraded.end());
  return absl::OkStatus();
}

absl::Status Handlers::ReleaseLease(const v1::ReleaseLeaseRequest& request,
                                    v1::ReleaseLeaseResponse* response, const Call& call) {
  GiveBack(Ids(request.places()), call);
  response->set_released(request.lease_id() != 0 && cache_->ReleaseLease(request.lease_id(), call.context));
  return absl::OkStatus();
}

absl::Status Handlers::DeleteNamespace(const v1::DeleteNamespaceRequest& request,
                                       v1::DeleteNamespaceResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t blocks,
                          cache_->DeleteNamespace(request.namespace_id(), call.context));
  response->set_blocks(Signed(blocks));
  return absl::OkStatus();
}

absl::Status Handlers::PersistNamespace(const v1::PersistNamespaceRequest& request,
                                        v1::PersistNamespaceResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const NamespacePersistReport report,
                          cache_->PersistNamespace(request.namespace_id(), call.context));
  response->set_blocks(Signed(report.blocks));
  response->set_bytes(Signed(report.bytes));
  response->set_durable_blocks(Signed(report.durable_blocks));
  return absl::OkStatus();
}

absl::Status Handlers::ListNamespaces(const v1::ListNamespacesRequest&, v1::ListNamespacesResponse* response,
                                      const Call& call) {
  for (const NamespaceInfo& info : cache_->ListNamespaces(call.context)) {
    v1::NamespaceInfo* const out = response->add_namespaces();
    out->set_namespace_id(info.id);
    ToProto(info.spec, out->mutable_namespace_());
    out->set_block_bytes(Signed(info.block_bytes));
    out->set_blocks(Signed(info.blocks));
    out->set_durable_blocks(Signed(info.durable_blocks));
    out->set_leases(Signed(info.leases));
    out->set_hits(info.hits);
    out->set_misses(info.misses);
    out->set_stored_blocks(info.stored_blocks);
    out->set_present_blocks(info.present_blocks);
    out->set_loaded_blocks(info.loaded_blocks);
    out->set_dropped_blocks(info.dropped_blocks);
    out->set_persistence(info.persistence == Persistence::kAll ? v1::PERSISTENCE_ALL : v1::PERSISTENCE_NONE);
    out->set_priority(ToProto(info.priority));
    out->set_degraded_blocks(Signed(info.degraded_blocks));
  }
  return absl::OkStatus();
}

}  // namespace kvtide::service
