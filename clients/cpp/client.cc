#include "clients/cpp/client.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/cpp/channel.h"
#include "clients/cpp/convert.h"
#include "clients/cpp/session.h"
#include "kernels/base/status.h"
#include "kvtide/v1/kv_cache_service.grpc.pb.h"
#include "proto/data_type.h"

namespace kvtide::client {

using Stub = v1::KvCacheService::Stub;

struct Client::Impl {
  std::string address;
  ClientOptions options;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<Stub> stub;
  std::unique_ptr<Session> session;

  // One call, as an RPC of its own or on the session. `request` is left empty in the latter case.
  template <class Request, class Response>
  absl::Status Call(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                    Request* (v1::SessionRequest::*on_session)(),
                    Response* (v1::SessionResponse::*from_session)(), Request* request, Response* response) {
    if (session == nullptr) {
      grpc::ClientContext context;
      context.set_deadline(absl::ToChronoTime(absl::Now() + options.timeout));
      return FromGrpc((stub.get()->*method)(&context, *request, response));
    }
    v1::SessionRequest wrapped;
    (wrapped.*on_session)()->Swap(request);
    v1::SessionResponse answer;
    KVTIDE_RETURN_IF_ERROR(session->Call(&wrapped, &answer));
    response->Swap((answer.*from_session)());
    return absl::OkStatus();
  }
};

// The stub's method and the session's fields of one verb.
#define KVTIDE_VERB(Method, field) \
  &Stub::Method, &v1::SessionRequest::mutable_##field, &v1::SessionResponse::mutable_##field

Client::Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& address, ClientOptions options) {
  auto impl = std::make_unique<Impl>();
  impl->address = address;
  impl->options = options;
  KVTIDE_ASSIGN_OR_RETURN(impl->channel, OpenChannel(address, options));
  impl->stub = v1::KvCacheService::NewStub(impl->channel);
  if (options.session) {
    KVTIDE_ASSIGN_OR_RETURN(impl->session, Session::Start(impl->stub.get(), options.timeout));
  }
  return std::unique_ptr<Client>(new Client(std::move(impl)));
}

const std::string& Client::address() const { return impl_->address; }

absl::StatusOr<ServerInfo> Client::GetServerInfo() {
  v1::GetServerInfoRequest request;
  v1::GetServerInfoResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(GetServerInfo, get_server_info), &request, &response));
  return FromProto(response);
}

absl::Status Client::RegisterModel(const Model& model) {
  v1::RegisterModelRequest request;
  ToProto(model, request.mutable_model());
  v1::RegisterModelResponse response;
  return impl_->Call(KVTIDE_VERB(RegisterModel, register_model), &request, &response);
}

absl::StatusOr<SequenceId> Client::CreateSequence(const std::string& model, const SequenceOptions& options) {
  v1::CreateSequenceRequest request;
  request.set_model(model);
  ToProto(options, &request);
  v1::CreateSequenceResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(CreateSequence, create_sequence), &request, &response));
  return response.sequence_id();
}

absl::StatusOr<SequenceId> Client::ForkSequence(SequenceId sequence) {
  v1::ForkSequenceRequest request;
  request.set_sequence_id(sequence);
  v1::ForkSequenceResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(ForkSequence, fork_sequence), &request, &response));
  return response.sequence_id();
}

absl::Status Client::TruncateSequence(SequenceId sequence, int64_t tokens) {
  v1::TruncateSequenceRequest request;
  request.set_sequence_id(sequence);
  request.set_tokens(tokens);
  v1::TruncateSequenceResponse response;
  return impl_->Call(KVTIDE_VERB(TruncateSequence, truncate_sequence), &request, &response);
}

absl::Status Client::CloseSequence(SequenceId sequence) {
  v1::CloseSequenceRequest request;
  request.set_sequence_id(sequence);
  v1::CloseSequenceResponse response;
  return impl_->Call(KVTIDE_VERB(CloseSequence, close_sequence), &request, &response);
}

absl::StatusOr<int64_t> Client::Append(SequenceId sequence, int64_t start_position,
                                       std::span<const LayerTokens> layers) {
  v1::AppendRequest request;
  request.set_sequence_id(sequence);
  request.set_start_position(start_position);
  for (const LayerTokens& layer : layers) {
    v1::LayerTokens* out = request.add_layers();
    out->set_layer(layer.layer);
    ToProto(layer.k, out->mutable_k());
    ToProto(layer.v, out->mutable_v());
  }
  v1::AppendResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(Append, append), &request, &response));
  return response.tokens();
}

namespace {

template <class Items, class Response>
absl::Status CopyResults(const Items& items, const Response& response) {
  if (response.results_size() != static_cast<int>(items.size())) {
    return absl::InternalError(
        absl::StrCat("asked for ", items.size(), " results, got ", response.results_size()));
  }
  for (size_t i = 0; i < items.size(); i++) {
    KVTIDE_RETURN_IF_ERROR(
        Annotate(CopyResult(response.results(static_cast<int>(i)), items[i].output, items[i].lse),
                 absl::StrCat("item ", i)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<LayerRows>> Client::ReadTokens(SequenceId sequence, std::span<const int> layers,
                                                          int64_t first, int64_t count, DataType type) {
  std::vector<LayerRows> all;
  for (int64_t done = 0; done < count || done == 0;) {
    v1::ReadTokensRequest request;
    request.set_sequence_id(sequence);
    request.mutable_layers()->Add(layers.begin(), layers.end());
    request.set_first_token(first + done);
    request.set_tokens(count - done);
    request.set_dtype(DataTypeToProto(type));
    v1::ReadTokensResponse response;
    KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(ReadTokens, read_tokens), &request, &response));
    KVTIDE_RETURN_IF_ERROR(AppendRows(response, &all));
    done += response.tokens();
  }
  return all;
}

absl::Status Client::Attend(int layer, std::span<const AttendItem> items, const AttentionOptions& options) {
  v1::AttendRequest request;
  request.set_layer(layer);
  ToProto(options, request.mutable_options());
  for (const AttendItem& item : items) {
    v1::AttendItem* out = request.add_items();
    out->set_sequence_id(item.sequence);
    if (item.first_query_position) out->set_first_query_position(*item.first_query_position);
    ToProto(item.q, out->mutable_q());
  }
  v1::AttendResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(Attend, attend), &request, &response));
  return CopyResults(items, response);
}

absl::Status Client::AppendAttend(int layer, std::span<const AppendAttendItem> items,
                                  const AttentionOptions& options) {
  v1::AppendAttendRequest request;
  request.set_layer(layer);
  ToProto(options, request.mutable_options());
  for (const AppendAttendItem& item : items) {
    v1::AppendAttendItem* out = request.add_items();
    out->set_sequence_id(item.sequence);
    out->set_start_position(item.start_position);
    ToProto(item.q, out->mutable_q());
    ToProto(item.k, out->mutable_k());
    ToProto(item.v, out->mutable_v());
  }
  v1::AppendAttendResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(AppendAttend, append_attend), &request, &response));
  return CopyResults(items, response);
}

namespace {

MoveResult ToMoveResult(const v1::EvictSequencesResponse& response) {
  return {response.blocks(), response.bytes(), response.dropped_blocks(), response.blocks_left(),
          response.shared_blocks()};
}

}  // namespace

absl::StatusOr<MoveResult> Client::EvictSequences(std::span<const SequenceId> sequences,
                                                  const EvictOptions& options) {
  v1::EvictSequencesRequest request;
  request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
  request.set_tier(options.tier);
  request.set_drop(options.drop);
  v1::EvictSequencesResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(EvictSequences, evict_sequences), &request, &response));
  return ToMoveResult(response);
}

absl::StatusOr<MoveResult> Client::EvictAll(const EvictOptions& options) {
  v1::EvictSequencesRequest request;
  request.set_all(true);
  request.set_tier(options.tier);
  request.set_drop(options.drop);
  v1::EvictSequencesResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(EvictSequences, evict_sequences), &request, &response));
  return ToMoveResult(response);
}

absl::StatusOr<MoveResult> Client::PrefetchSequences(std::span<const SequenceId> sequences) {
  v1::PrefetchSequencesRequest request;
  request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
  v1::PrefetchSequencesResponse response;
  KVTIDE_RETURN_IF_ERROR(
      impl_->Call(KVTIDE_VERB(PrefetchSequences, prefetch_sequences), &request, &response));
  return MoveResult{response.blocks(), response.bytes(), 0, response.blocks_left()};
}

absl::StatusOr<PersistResult> Client::PersistSequences(std::span<const SequenceId> sequences) {
  v1::PersistSequencesRequest request;
  request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
  v1::PersistSequencesResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(PersistSequences, persist_sequences), &request, &response));
  return PersistResult{response.sequences(), response.tokens(), response.blocks(), response.bytes()};
}

absl::StatusOr<std::vector<SequenceInfo>> Client::ListSequences(const std::string& model) {
  std::vector<SequenceInfo> sequences;
  std::string token;
  do {
    v1::ListSequencesRequest request;
    request.set_page_size(1000);
    request.set_page_token(token);
    request.set_model(model);
    v1::ListSequencesResponse response;
    KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(ListSequences, list_sequences), &request, &response));
    for (const v1::Sequence& sequence : response.sequences()) sequences.push_back(FromProto(sequence));
    token = response.next_page_token();
  } while (!token.empty());
  return sequences;
}

absl::StatusOr<ServerStats> Client::GetStats() {
  v1::GetStatsRequest request;
  v1::GetStatsResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(GetStats, get_stats), &request, &response));
  return FromProto(response);
}

absl::StatusOr<PlanAnswer> Client::Plan(const PlanQuestion& question) {
  v1::PlanRequest request;
  ToProto(question, &request);
  v1::PlanResponse response;
  KVTIDE_RETURN_IF_ERROR(impl_->Call(KVTIDE_VERB(Plan, plan), &request, &response));
  return FromProto(response);
}

absl::Status Client::CheckHealth() { return AskHealth(impl_->channel, impl_->options.timeout); }

}  // namespace kvtide::client
