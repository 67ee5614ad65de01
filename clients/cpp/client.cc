#include "clients/cpp/client.h"

#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "clients/cpp/client_impl.h"
#include "clients/cpp/convert.h"
#include "clients/cpp/tensor_mover.h"
#include "kernels/base/status.h"
#include "proto/data_type.h"

namespace kvtide::client {

Client::Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& address, ClientOptions options) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<Impl> impl, ConnectGrpc(address, options));
  return std::unique_ptr<Client>(new Client(std::move(impl)));
}

const std::string& Client::address() const { return impl_->address; }

absl::StatusOr<ServerInfo> Client::GetServerInfo() {
  v1::SessionRequest message;
  message.mutable_get_server_info();
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::GetServerInfoResponse& response = answer.get_server_info();
  return FromProto(response);
}

absl::Status Client::UnregisterModel(const std::string& model) {
  v1::SessionRequest message;
  v1::SessionResponse response;
  message.mutable_unregister_model()->set_model(model);
  return impl_->carrier->Call(&message, &response);
}

absl::Status Client::RegisterModel(const Model& model) {
  v1::SessionRequest message;
  v1::RegisterModelRequest& request = *message.mutable_register_model();
  ToProto(model, request.mutable_model());
  v1::SessionResponse answer;
  const absl::Status status = impl_->carrier->Call(&message, &answer);
  // Transforms of keys may be more than a ring of shared memory holds: they go over the socket, once for a
  // model.
  if (status.code() != absl::StatusCode::kResourceExhausted || model.layers.empty() ||
      model.layers[0].key_transform.empty() || impl_->carrier->memory() == nullptr ||
      !absl::StartsWith(impl_->address, "unix:"))
    return status;
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<Impl> grpc, ConnectGrpc(impl_->address, {}));
  return grpc->carrier->Call(&message, &answer);
}

absl::StatusOr<SequenceId> Client::CreateSequence(const std::string& model, const SequenceOptions& options,
                                                  LeaseId prefix, int64_t* tokens) {
  v1::SessionRequest message;
  v1::CreateSequenceRequest& request = *message.mutable_create_sequence();
  request.set_model(model);
  ToProto(options, &request);
  request.set_prefix_lease(prefix);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::CreateSequenceResponse& response = answer.create_sequence();
  if (tokens != nullptr) *tokens = response.tokens();
  return response.sequence_id();
}

absl::StatusOr<CachedPrefix> Client::LookupPrefix(const std::string& model, const SequenceOptions& options,
                                                  std::span<const TokenId> token_ids, double lease_seconds,
                                                  bool peek) {
  v1::SessionRequest message;
  v1::LookupPrefixRequest& request = *message.mutable_lookup_prefix();
  request.mutable_like()->set_model(model);
  ToProto(options, request.mutable_like());
  request.mutable_token_ids()->Add(token_ids.begin(), token_ids.end());
  request.set_lease_seconds(lease_seconds);
  request.set_peek(peek);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::LookupPrefixResponse& response = answer.lookup_prefix();
  CachedPrefix prefix{response.tokens(), {}, response.lease_id(), response.lease_seconds()};
  for (const v1::PrefixTokens& run : response.tiers()) prefix.tiers.emplace_back(run.tier(), run.tokens());
  return prefix;
}

absl::StatusOr<bool> Client::ReleaseLease(LeaseId lease) {
  v1::SessionRequest message;
  message.mutable_release_lease()->set_lease_id(lease);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  return answer.release_lease().released();
}

absl::StatusOr<SequenceId> Client::ForkSequence(SequenceId sequence) {
  v1::SessionRequest message;
  v1::ForkSequenceRequest& request = *message.mutable_fork_sequence();
  request.set_sequence_id(sequence);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::ForkSequenceResponse& response = answer.fork_sequence();
  return response.sequence_id();
}

absl::Status Client::TruncateSequence(SequenceId sequence, int64_t tokens) {
  v1::SessionRequest message;
  v1::TruncateSequenceRequest& request = *message.mutable_truncate_sequence();
  request.set_sequence_id(sequence);
  request.set_tokens(tokens);
  v1::SessionResponse answer;
  return impl_->carrier->Call(&message, &answer);
}

absl::Status Client::CloseSequence(SequenceId sequence) {
  impl_->step_tables.Forget(sequence);
  v1::SessionRequest message;
  v1::CloseSequenceRequest& request = *message.mutable_close_sequence();
  request.set_sequence_id(sequence);
  v1::SessionResponse answer;
  return impl_->carrier->Call(&message, &answer);
}

absl::StatusOr<int64_t> Client::Append(SequenceId sequence, int64_t start_position,
                                       std::span<const LayerTokens> layers,
                                       std::span<const TokenId> token_ids) {
  v1::SessionRequest message;
  v1::AppendRequest& request = *message.mutable_append();
  request.set_sequence_id(sequence);
  request.set_start_position(start_position);
  request.mutable_token_ids()->Add(token_ids.begin(), token_ids.end());
  TensorMover tensors(impl_->carrier->memory());
  for (const LayerTokens& layer : layers) {
    tensors.Count(layer.k);
    tensors.Count(layer.v);
  }
  KVTIDE_RETURN_IF_ERROR(tensors.Begin());
  for (const LayerTokens& layer : layers) {
    v1::LayerTokens* out = request.add_layers();
    out->set_layer(layer.layer);
    tensors.Add(layer.k, out->mutable_k());
    tensors.Add(layer.v, out->mutable_v());
  }
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::AppendResponse& response = answer.append();
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

namespace {

// At least one item; k and v of all have one type and as many tokens.
absl::Status CheckReadItems(std::span<const ReadItem> items) {
  if (items.empty()) return absl::InvalidArgumentError("the read names no layer");
  const MutableTensorRef& like = items[0].k;
  for (const ReadItem& item : items) {
    const MutableTensorRef &k = item.k, &v = item.v;
    if (k.shape.size() != 3 || v.shape.size() != 3 || k.shape[0] < 1 || k.shape[0] != v.shape[0] ||
        k.type != v.type || k.shape[0] != like.shape[0] || k.type != like.type) {
      return absl::InvalidArgumentError(absl::StrCat(
          "layer ", item.layer,
          ": k and v: expected [tokens, kv_heads, head_dim] of one type with the same tokens, at "
          "least one, in all layers"));
    }
  }
  return absl::OkStatus();
}

size_t BytesOf(const MutableTensorRef& tensor) {
  return BytesOf(TensorRef{tensor.data, tensor.type, tensor.shape});
}

absl::Status CopyRows(const char* name, const LayerRows& from, const std::vector<std::byte>& rows, int dim,
                      const MutableTensorRef& to) {
  const std::vector<int64_t> shape = {to.shape[0], from.kv_heads, dim};
  if (to.shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat("layer ", from.layer, ": ", name, ": the shape is [",
                                                   absl::StrJoin(to.shape, ", "), "], expected [tokens, ",
                                                   from.kv_heads, ", ", dim, "]"));
  }
  if (rows.size() != BytesOf(to))
    return absl::InternalError(absl::StrCat(name, ": the answer has ", rows.size(), " bytes"));
  std::memcpy(to.data, rows.data(), rows.size());
  return absl::OkStatus();
}

absl::Status CopyRows(const std::vector<LayerRows>& rows, std::span<const ReadItem> items) {
  if (rows.size() != items.size())
    return absl::InternalError(absl::StrCat("asked for ", items.size(), " layers, got ", rows.size()));
  for (size_t i = 0; i < items.size(); i++) {
    KVTIDE_RETURN_IF_ERROR(CopyRows("k", rows[i], rows[i].k, rows[i].head_dim_k, items[i].k));
    KVTIDE_RETURN_IF_ERROR(CopyRows("v", rows[i], rows[i].v, rows[i].head_dim_v, items[i].v));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<LayerRows>> Client::ReadTokens(SequenceId sequence, std::span<const int> layers,
                                                          int64_t first, int64_t count, DataType type) {
  std::vector<LayerRows> all;
  for (int64_t done = 0; done < count || done == 0;) {
    v1::SessionRequest message;
    v1::ReadTokensRequest& request = *message.mutable_read_tokens();
    request.set_sequence_id(sequence);
    request.mutable_layers()->Add(layers.begin(), layers.end());
    request.set_first_token(first + done);
    request.set_tokens(count - done);
    request.set_dtype(DataTypeToProto(type));
    v1::SessionResponse answer;
    KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
    const v1::ReadTokensResponse& response = answer.read_tokens();
    KVTIDE_RETURN_IF_ERROR(AppendRows(response, &all));
    done += response.tokens();
  }
  return all;
}

absl::Status Client::ReadTokens(SequenceId sequence, int64_t first, std::span<const ReadItem> items) {
  KVTIDE_RETURN_IF_ERROR(CheckReadItems(items));
  const int64_t tokens = items[0].k.shape[0];
  const DataType type = items[0].k.type;
  if (impl_->carrier->memory() == nullptr) {
    std::vector<int> layers;
    for (const ReadItem& item : items) layers.push_back(item.layer);
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<LayerRows> rows,
                            ReadTokens(sequence, layers, first, tokens, type));
    return CopyRows(rows, items);
  }
  v1::SessionRequest message;
  v1::ReadTokensRequest& request = *message.mutable_read_tokens();
  request.set_sequence_id(sequence);
  request.set_first_token(first);
  request.set_tokens(tokens);
  request.set_dtype(DataTypeToProto(type));
  TensorMover tensors(impl_->carrier->memory());
  for (const ReadItem& item : items) {
    tensors.Count(item.k.data, BytesOf(item.k));
    tensors.Count(item.v.data, BytesOf(item.v));
  }
  KVTIDE_RETURN_IF_ERROR(tensors.Begin());
  for (const ReadItem& item : items) {
    request.add_layers(item.layer);
    tensors.AddResult(item.k.data, BytesOf(item.k), request.add_k_places());
    tensors.AddResult(item.v.data, BytesOf(item.v), request.add_v_places());
  }
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  tensors.TakeResults();
  return absl::OkStatus();
}

namespace {

void CountTensors(const AttendItem& item, TensorMover* tensors) { tensors->Count(item.q); }
void CountTensors(const AppendAttendItem& item, TensorMover* tensors) {
  tensors->Count(item.q);
  tensors->Count(item.k);
  tensors->Count(item.v);
}
void AddTensors(const AttendItem& item, TensorMover* tensors, v1::AttendItem* out) {
  if (item.first_query_position) out->set_first_query_position(*item.first_query_position);
  tensors->Add(item.q, out->mutable_q());
}
void AddTensors(const AppendAttendItem& item, TensorMover* tensors, v1::AppendAttendItem* out) {
  out->set_start_position(item.start_position);
  out->mutable_token_ids()->Add(item.token_ids.begin(), item.token_ids.end());
  tensors->Add(item.q, out->mutable_q());
  tensors->Add(item.k, out->mutable_k());
  tensors->Add(item.v, out->mutable_v());
}

// What Attend and AppendAttend have in common. `message` holds `request`, `answer` will hold `response`.
template <class Item, class Request, class Response>
absl::Status RunAttention(Carrier* carrier, int layer, std::span<const Item> items,
                          const AttentionOptions& options, v1::SessionRequest* message, Request* request,
                          const Response& (v1::SessionResponse::*response)() const) {
  request->set_layer(layer);
  ToProto(options, request->mutable_options());
  TensorMover tensors(carrier->memory());
  for (const Item& item : items) {
    CountTensors(item, &tensors);
    tensors.Count(item.output.data(), item.output.size_bytes());
    tensors.Count(item.lse.data(), item.lse.size_bytes());
  }
  KVTIDE_RETURN_IF_ERROR(tensors.Begin());
  for (const Item& item : items) {
    auto* const out = request->add_items();
    out->set_sequence_id(item.sequence);
    AddTensors(item, &tensors, out);
    if (!tensors.has_memory()) continue;
    tensors.AddResult(item.output.data(), item.output.size_bytes(), out->mutable_output_place());
    if (!item.lse.empty())
      tensors.AddResult(item.lse.data(), item.lse.size_bytes(), out->mutable_lse_place());
  }
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(carrier->Call(message, &answer));
  if (!tensors.has_memory()) return CopyResults(items, (answer.*response)());
  tensors.TakeResults();
  return absl::OkStatus();
}

}  // namespace

absl::Status Client::Attend(int layer, std::span<const AttendItem> items, const AttentionOptions& options,
                            uint64_t step) {
  v1::SessionRequest message;
  message.mutable_attend()->set_step_id(step);
  return RunAttention(impl_->carrier.get(), layer, items, options, &message, message.mutable_attend(),
                      &v1::SessionResponse::attend);
}

absl::Status Client::AppendAttend(int layer, std::span<const AppendAttendItem> items,
                                  const AttentionOptions& options, uint64_t step) {
  v1::SessionRequest message;
  message.mutable_append_attend()->set_step_id(step);
  return RunAttention(impl_->carrier.get(), layer, items, options, &message, message.mutable_append_attend(),
                      &v1::SessionResponse::append_attend);
}

namespace {

// Sends what begins a step, with tables if they are wanted.
template <class Response>
absl::StatusOr<Step> RunBegin(Client::Impl& client, v1::SessionRequest* message, bool tables,
                              const Response& (v1::SessionResponse::*response)() const) {
  if (tables) {
    KVTIDE_ASSIGN_OR_RETURN(const StepView view, client.step_tables.Begin(client.carrier.get(), message));
    Step step{view.id, view.starts, {}, client.step_tables.kinds()};
    const size_t groups = view.tables.size() / view.starts.size();
    for (size_t i = 0; i < view.tables.size(); i++) {
      if (i % groups == 0) step.tables.emplace_back();
      step.tables.back().push_back(*view.tables[i]);
    }
    return step;
  }
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client.carrier->Call(message, &answer));
  Step step;
  step.id = (answer.*response)().step_id();
  for (const v1::StepSequence& item : (answer.*response)().items())
    step.starts.push_back(item.start_position());
  return step;
}

}  // namespace

absl::StatusOr<Step> Client::BeginStep(std::span<const StepItem> items, const StepOptions& options) {
  v1::SessionRequest message;
  RequestStep(items, options.after, &message);
  return RunBegin(*impl_, &message, options.tables, &v1::SessionResponse::begin_step);
}

absl::StatusOr<Step> Client::PinStep(std::span<const SequenceId> sequences, bool tables) {
  v1::SessionRequest message;
  RequestPin(sequences, &message);
  return RunBegin(*impl_, &message, tables, &v1::SessionResponse::pin_step);
}

absl::Status Client::EndStep(uint64_t step, std::span<const StepTokens> tokens) {
  v1::SessionRequest message;
  message.mutable_end_step()->set_step_id(step);
  for (const StepTokens& item : tokens) {
    v1::StepTokens* const out = message.mutable_end_step()->add_tokens();
    out->set_item(static_cast<int32_t>(item.item));
    out->mutable_token_ids()->Add(item.token_ids.begin(), item.token_ids.end());
  }
  v1::SessionResponse answer;
  return impl_->carrier->Call(&message, &answer);
}

absl::Status Client::RollBackStep(uint64_t step) {
  v1::SessionRequest message;
  message.mutable_end_step()->set_step_id(step);
  message.mutable_end_step()->set_roll_back(true);
  v1::SessionResponse answer;
  return impl_->carrier->Call(&message, &answer);
}

namespace {

MoveResult ToMoveResult(const v1::EvictSequencesResponse& response) {
  return {response.blocks(),      response.bytes(),         response.dropped_blocks(),
          response.blocks_left(), response.shared_blocks(), response.degraded_blocks()};
}

}  // namespace

absl::StatusOr<MoveResult> Client::EvictSequences(std::span<const SequenceId> sequences,
                                                  const EvictOptions& options) {
  v1::SessionRequest message;
  v1::EvictSequencesRequest& request = *message.mutable_evict_sequences();
  request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
  request.set_tier(options.tier);
  request.set_drop(options.drop);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::EvictSequencesResponse& response = answer.evict_sequences();
  return ToMoveResult(response);
}

absl::StatusOr<MoveResult> Client::EvictAll(const EvictOptions& options) {
  v1::SessionRequest message;
  v1::EvictSequencesRequest& request = *message.mutable_evict_sequences();
  request.set_all(true);
  request.set_tier(options.tier);
  request.set_drop(options.drop);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::EvictSequencesResponse& response = answer.evict_sequences();
  return ToMoveResult(response);
}

absl::StatusOr<MoveResult> Client::PrefetchSequences(std::span<const SequenceId> sequences) {
  v1::SessionRequest message;
  v1::PrefetchSequencesRequest& request = *message.mutable_prefetch_sequences();
  request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::PrefetchSequencesResponse& response = answer.prefetch_sequences();
  return MoveResult{
      response.blocks(),         response.bytes(), response.dropped_blocks(), response.blocks_left(), 0,
      response.degraded_blocks()};
}

absl::StatusOr<RunningConfig> Client::GetConfig() {
  v1::SessionRequest message;
  message.mutable_get_config();
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  RunningConfig config;
  config.file = answer.get_config().file();
  for (const v1::ConfigValue& value : answer.get_config().values())
    config.values.push_back({value.name(), value.value(), value.source(), value.live()});
  return config;
}

absl::StatusOr<ConfigChanges> Client::ReloadConfig() {
  v1::SessionRequest message;
  message.mutable_reload_config();
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::ReloadConfigResponse& response = answer.reload_config();
  return ConfigChanges{{response.changed().begin(), response.changed().end()},
                       {response.needs_restart().begin(), response.needs_restart().end()}};
}

absl::Status Client::PinSequences(std::span<const SequenceId> sequences, absl::Duration time) {
  v1::SessionRequest message;
  v1::PinSequencesRequest& request = *message.mutable_pin_sequences();
  request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
  request.set_seconds(absl::ToDoubleSeconds(time));
  v1::SessionResponse answer;
  return impl_->carrier->Call(&message, &answer);
}

absl::Status Client::SetPriority(std::span<const SequenceId> sequences, Priority priority) {
  v1::SessionRequest message;
  v1::SetPriorityRequest& request = *message.mutable_set_priority();
  request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
  request.set_priority(static_cast<v1::Priority>(priority));
  v1::SessionResponse answer;
  return impl_->carrier->Call(&message, &answer);
}

absl::StatusOr<PersistResult> Client::PersistSequences(std::span<const SequenceId> sequences) {
  v1::SessionRequest message;
  v1::PersistSequencesRequest& request = *message.mutable_persist_sequences();
  request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::PersistSequencesResponse& response = answer.persist_sequences();
  return PersistResult{response.sequences(), response.tokens(), response.blocks(), response.bytes()};
}

absl::StatusOr<SequenceInfo> Client::GetSequence(SequenceId sequence) {
  v1::SessionRequest message;
  v1::ListSequencesRequest& request = *message.mutable_list_sequences();
  request.add_sequence_ids(sequence);
  request.set_page_size(1000);  // a daemon that knows no sequence_ids lists what it has
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  for (const v1::Sequence& found : answer.list_sequences().sequences())
    if (found.sequence_id() == sequence) return FromProto(found);
  return absl::NotFoundError(absl::StrCat("the daemon holds no sequence ", sequence));
}

absl::StatusOr<std::vector<SequenceInfo>> Client::ListSequences(const std::string& model) {
  std::vector<SequenceInfo> sequences;
  std::string token;
  do {
    v1::SessionRequest message;
    v1::ListSequencesRequest& request = *message.mutable_list_sequences();
    request.set_page_size(1000);
    request.set_page_token(token);
    request.set_model(model);
    v1::SessionResponse answer;
    KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
    const v1::ListSequencesResponse& response = answer.list_sequences();
    for (const v1::Sequence& sequence : response.sequences()) sequences.push_back(FromProto(sequence));
    token = response.next_page_token();
  } while (!token.empty());
  return sequences;
}

absl::StatusOr<ServerStats> Client::GetStats() {
  v1::SessionRequest message;
  message.mutable_get_stats();
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::GetStatsResponse& response = answer.get_stats();
  return FromProto(response);
}

absl::StatusOr<PlanAnswer> Client::Plan(const PlanQuestion& question) {
  v1::SessionRequest message;
  v1::PlanRequest& request = *message.mutable_plan();
  ToProto(question, &request);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(impl_->carrier->Call(&message, &answer));
  const v1::PlanResponse& response = answer.plan();
  return FromProto(response);
}

absl::Status Client::CheckHealth() {
  return impl_->check_health ? impl_->check_health() : GetServerInfo().status();
}

}  // namespace kvtide::client
