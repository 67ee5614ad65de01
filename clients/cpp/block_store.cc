#include "clients/cpp/block_store.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "clients/cpp/client_impl.h"
#include "clients/cpp/tensor_mover.h"
#include "kernels/base/status.h"
#include "proto/data_type.h"

namespace kvtide::client {
namespace {

v1::BlockForm ToProto(BlockForm form) {
  switch (form) {
    case BlockForm::kDefault:
      return v1::BLOCK_FORM_UNSPECIFIED;
    case BlockForm::kTensors:
      return v1::BLOCK_FORM_TENSORS;
    case BlockForm::kBytes:
      return v1::BLOCK_FORM_BYTES;
  }
  return v1::BLOCK_FORM_UNSPECIFIED;
}

void ToProto(const PageLayout& layout, v1::PageLayout* proto) {
  proto->set_dtype(DataTypeToProto(layout.type));
  proto->set_order(layout.heads_first ? v1::PAGE_ORDER_HND : v1::PAGE_ORDER_NHD);
  proto->set_block_stride(layout.block_stride);
  proto->set_layer_stride(layout.layer_stride);
  proto->set_value_offset(layout.value_offset);
  proto->set_token_stride_k(layout.token_stride_k);
  proto->set_token_stride_v(layout.token_stride_v);
  proto->set_head_stride_k(layout.head_stride_k);
  proto->set_head_stride_v(layout.head_stride_v);
}

}  // namespace

absl::StatusOr<std::unique_ptr<BlockStore>> BlockStore::Open(Client& client, const NamespaceSpec& spec) {
  v1::SessionRequest message;
  v1::OpenNamespaceRequest& request = *message.mutable_open_namespace();
  v1::Namespace& out = *request.mutable_namespace_();
  out.set_model(spec.model);
  out.set_block_tokens(spec.block_tokens);
  out.set_salt(spec.salt);
  for (const std::string& pair : spec.degrade) out.add_degrade(pair);
  if (const auto* tensors = std::get_if<TensorBlocks>(&spec.content); tensors != nullptr) {
    v1::TensorBlocks& to = *out.mutable_tensors();
    to.set_layers(tensors->layers);
    to.set_kv_heads(tensors->kv_heads);
    to.set_head_dim_k(tensors->head_dim_k);
    to.set_head_dim_v(tensors->head_dim_v);
    to.set_pair(tensors->pair);
  } else {
    const auto& opaque = std::get<OpaqueBlocks>(spec.content);
    out.mutable_opaque()->set_block_bytes(opaque.block_bytes);
    out.mutable_opaque()->set_encoding(opaque.encoding);
  }
  if (spec.persist_all) request.set_persistence(v1::PERSISTENCE_ALL);
  request.set_priority(static_cast<v1::Priority>(spec.priority));
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client.impl_->carrier->Call(&message, &answer));
  const v1::OpenNamespaceResponse& response = answer.open_namespace();
  std::unique_ptr<BlockStore> store(new BlockStore(client));
  store->id_ = response.namespace_id();
  store->block_bytes_ = response.block_bytes();
  store->pair_ = response.pair();
  store->codec_version_k_ = response.codec_version_k();
  store->codec_version_v_ = response.codec_version_v();
  store->existed_ = response.existed();
  return store;
}

absl::StatusOr<StoreBlocksResult> BlockStore::Store(std::span<const std::string_view> keys,
                                                    std::span<const std::byte> payload, BlockForm form,
                                                    const PageLayout& layout, Priority priority) {
  v1::SessionRequest message;
  v1::StoreBlocksRequest& request = *message.mutable_store_blocks();
  request.set_namespace_id(id_);
  for (const std::string_view key : keys) request.add_keys(key.data(), key.size());
  request.set_form(ToProto(form));
  request.set_priority(static_cast<v1::Priority>(priority));
  ToProto(layout, request.mutable_layout());
  TensorMover mover(client_.impl_->carrier->memory());
  mover.Count(payload.data(), payload.size());
  KVTIDE_RETURN_IF_ERROR(mover.Begin());
  if (mover.has_memory()) {
    mover.AddSource(payload.data(), payload.size(), request.mutable_place());
  } else {
    request.set_data(payload.data(), payload.size());
  }
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  const v1::StoreBlocksResponse& response = answer.store_blocks();
  return StoreBlocksResult{response.stored(), response.present(), response.left_out(), response.problem()};
}

absl::StatusOr<LookupBlocksResult> BlockStore::Lookup(std::span<const std::string_view> keys,
                                                      double lease_seconds, bool peek) {
  v1::SessionRequest message;
  v1::LookupBlocksRequest& request = *message.mutable_lookup_blocks();
  request.set_namespace_id(id_);
  for (const std::string_view key : keys) request.add_keys(key.data(), key.size());
  request.set_lease_seconds(lease_seconds);
  request.set_peek(peek);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  const v1::LookupBlocksResponse& response = answer.lookup_blocks();
  LookupBlocksResult result{response.hits(),
                            {},
                            response.lease_id(),
                            response.lease_seconds(),
                            {response.degraded_blocks().begin(), response.degraded_blocks().end()}};
  for (const v1::BlockHits& hits : response.tiers()) result.tiers.emplace_back(hits.tier(), hits.blocks());
  return result;
}

absl::Status BlockStore::Load(LeaseId lease, int64_t first, int64_t count, std::span<std::byte> payload,
                              BlockForm form, const PageLayout& layout, std::vector<int64_t>* lost,
                              std::vector<int64_t>* degraded) {
  if (count < 1) return absl::InvalidArgumentError(absl::StrCat("a load of ", count, " blocks"));
  v1::SessionRequest message;
  v1::LoadBlocksRequest& request = *message.mutable_load_blocks();
  request.set_lease_id(lease);
  request.set_first_block(first);
  request.set_blocks(count);
  request.set_form(ToProto(form));
  ToProto(layout, request.mutable_layout());
  request.set_allow_lost(lost != nullptr);
  TensorMover mover(client_.impl_->carrier->memory());
  mover.Count(payload.data(), payload.size());
  KVTIDE_RETURN_IF_ERROR(mover.Begin());
  if (mover.has_memory()) mover.AddResult(payload.data(), payload.size(), request.mutable_place());
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  const v1::LoadBlocksResponse& response = answer.load_blocks();
  if (lost != nullptr) lost->assign(response.lost_blocks().begin(), response.lost_blocks().end());
  if (degraded != nullptr)
    degraded->assign(response.degraded_blocks().begin(), response.degraded_blocks().end());
  if (mover.has_memory()) {
    mover.TakeResults();
    return absl::OkStatus();
  }
  if (response.data().size() > payload.size())
    return absl::InvalidArgumentError(absl::StrCat("the payload of ", count, " blocks has ", payload.size(),
                                                   " bytes, must have ", response.data().size(), " or more"));
  std::memcpy(payload.data(), response.data().data(), response.data().size());
  return absl::OkStatus();
}

HostTier BlockStore::host_tier() const { return client_.impl_->carrier->host_tier(); }

absl::StatusOr<BlocksInPlace> BlockStore::LoadInPlace(LeaseId lease, int64_t first, int64_t count,
                                                      std::span<const uint64_t> done) {
  if (count < 1) return absl::InvalidArgumentError(absl::StrCat("a load of ", count, " blocks"));
  BlocksInPlace loaded;
  loaded.tier = host_tier();
  const std::span<const std::byte> tier = loaded.tier.bytes;
  if (tier.empty())
    return absl::FailedPreconditionError("this client does not map the tier of host memory (--host-sharing)");
  v1::SessionRequest message;
  v1::LoadBlocksRequest& request = *message.mutable_load_blocks();
  request.set_lease_id(lease);
  request.set_first_block(first);
  request.set_blocks(count);
  request.set_form(v1::BLOCK_FORM_BYTES);
  request.set_allow_lost(true);
  request.set_in_place(true);
  request.mutable_done_places()->Add(done.begin(), done.end());
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  const v1::LoadBlocksResponse& response = answer.load_blocks();
  loaded.places = response.places_id();
  loaded.lost.assign(response.lost_blocks().begin(), response.lost_blocks().end());
  loaded.degraded.assign(response.degraded_blocks().begin(), response.degraded_blocks().end());
  for (const int64_t offset : response.offsets()) {
    const bool inside = offset >= 0 && static_cast<uint64_t>(offset) <= tier.size() &&
                        static_cast<uint64_t>(block_bytes_) <= tier.size() - static_cast<uint64_t>(offset);
    if (offset >= 0 && !inside) return absl::InternalError("kvtided names a place outside of its tier");
    loaded.blocks.push_back(inside ? tier.data() + offset : nullptr);
  }
  if (loaded.blocks.size() != static_cast<size_t>(count))
    return absl::InternalError(
        absl::StrCat("kvtided names ", loaded.blocks.size(), " places of ", count, " blocks"));
  return loaded;
}

absl::Status BlockStore::GiveBack(std::span<const uint64_t> places) {
  if (places.empty()) return absl::OkStatus();
  v1::SessionRequest message;
  message.mutable_release_lease()->mutable_places()->Add(places.begin(), places.end());
  v1::SessionResponse answer;
  return client_.impl_->carrier->Call(&message, &answer);
}

absl::StatusOr<bool> BlockStore::Release(LeaseId lease) {
  v1::SessionRequest message;
  message.mutable_release_lease()->set_lease_id(lease);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  return answer.release_lease().released();
}

absl::StatusOr<PersistNamespaceResult> BlockStore::Persist() {
  v1::SessionRequest message;
  message.mutable_persist_namespace()->set_namespace_id(id_);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  const v1::PersistNamespaceResponse& response = answer.persist_namespace();
  return PersistNamespaceResult{response.blocks(), response.bytes(), response.durable_blocks()};
}

absl::StatusOr<int64_t> BlockStore::Delete() {
  v1::SessionRequest message;
  message.mutable_delete_namespace()->set_namespace_id(id_);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  return answer.delete_namespace().blocks();
}

}  // namespace kvtide::client
