// The verbs that carry tensors: Append, Attend, AppendAttend.
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/service/handlers.h"
#include "daemon/service/open_steps.h"
#include "kernels/base/status.h"
#include "proto/data_type.h"

namespace kvtide::service {
namespace {

absl::StatusOr<LayerKv> CheckLayerTokens(const v1::LayerTokens& tokens, const LayerGroupSpec& group,
                                         const Call& call, int64_t* count) {
  KVTIDE_ASSIGN_OR_RETURN(const IncomingTensor k, CheckTensor(tokens.k(), "k", group.shape.kv_heads,
                                                              group.shape.head_dim_k, call.tensors));
  KVTIDE_ASSIGN_OR_RETURN(const IncomingTensor v, CheckTensor(tokens.v(), "v", group.shape.kv_heads,
                                                              group.shape.head_dim_v, call.tensors));
  if (k.tokens != v.tokens) {
    return absl::InvalidArgumentError(absl::StrCat("k has ", k.tokens, " tokens, v has ", v.tokens));
  }
  if (*count != 0 && k.tokens != *count) {
    return absl::InvalidArgumentError(
        absl::StrCat("k has ", k.tokens, " tokens, the layer before has ", *count));
  }
  *count = k.tokens;
  return LayerKv{tokens.layer(), k.view, v.view, k.elements, v.elements};
}

// What all items of a batch share. Pointers are into the request.
absl::Status CheckOptions(const v1::AttentionOptions& options, const LayerGroupSpec& group, AttendCall* call,
                          DataType* output_type) {
  if (options.has_scale()) {
    if (!std::isfinite(options.scale())) return absl::InvalidArgumentError("options.scale is not finite");
    call->scale = options.scale();
  }
  if (options.has_softcap()) {
    if (!std::isfinite(options.softcap()) || options.softcap() < 0) {
      return absl::InvalidArgumentError(absl::StrCat("options.softcap is ", options.softcap()));
    }
    call->softcap = options.softcap();
  }
  if (options.has_window()) {
    if (options.window() < 0 || options.window() > kMostWindow)
      return absl::InvalidArgumentError(
          absl::StrCat("options.window is ", options.window(), "; allowed are 0 to ", kMostWindow));
    call->window = options.window();
  }
  call->causal = !options.has_causal() || options.causal();
  if (options.sinks_size() != 0) {
    if (options.sinks_size() != group.heads) {
      return absl::InvalidArgumentError(absl::StrCat("options.sinks has ", options.sinks_size(),
                                                     " values, the layer has ", group.heads, " query heads"));
    }
    for (int i = 0; i < options.sinks_size(); i++) {
      // -inf is a sink that takes no weight.
      if (std::isnan(options.sinks(i)) || options.sinks(i) == INFINITY) {
        return absl::InvalidArgumentError(absl::StrCat("options.sinks[", i, "] is not a logit"));
      }
    }
    call->sinks = options.sinks().data();
  }
  *output_type = DataType::kF32;
  if (options.output_dtype() != v1::DATA_TYPE_UNSPECIFIED) {
    auto type = DataTypeFromProto(options.output_dtype());
    if (!type.ok()) return Annotate(type.status(), "options.output_dtype");
    *output_type = *type;
  }
  return absl::OkStatus();
}

}  // namespace

// A batch under way: requests checked against one layer of one model, answers allocated in the response.
class Handlers::Batch {
 public:
  Batch(Handlers* handlers, int layer, const v1::AttentionOptions& options, const Call& caller)
      : handlers_(handlers), options_(options), caller_(caller) {
    call_.layer = layer;
    call_.context = &caller.context;
  }

  // The first sequence decides the model, the others must have the same.
  absl::Status AddSequence(SequenceId sequence, AttendRequest* request) {
    KVTIDE_ASSIGN_OR_RETURN(const SpecPointer spec, handlers_->SpecOfSequence(sequence, caller_.context));
    if (spec_ == nullptr) {
      spec_ = spec;
      KVTIDE_ASSIGN_OR_RETURN(group_, GroupOfLayer(*spec_, call_.layer));
      KVTIDE_RETURN_IF_ERROR(CheckOptions(options_, *group_, &call_, &output_type_));
    } else if (spec_ != spec) {
      return absl::InvalidArgumentError(
          absl::StrCat("the sequence is of model ", spec->name, ", those before it are of ", spec_->name));
    }
    request->sequence = sequence;
    return absl::OkStatus();
  }

  // The queries of an item, and where its results go if it names places.
  template <class Item>
  absl::Status AddQueries(const Item& item, AttendRequest* request) {
    KVTIDE_ASSIGN_OR_RETURN(
        const IncomingTensor tensor,
        CheckTensor(item.q(), "q", group_->heads, group_->shape.head_dim_k, caller_.tensors));
    KVTIDE_RETURN_IF_ERROR(CheckFinite(tensor, "q", group_->heads, group_->shape.head_dim_k));
    request->q = tensor.view;
    request->q_elements = tensor.elements;
    request->queries = tensor.tokens;
    if (item.has_output_place() || item.has_lse_place()) return FindPlaces(item, request);
    answer_bytes_ += tensor.tokens * group_->heads *
                     (group_->shape.head_dim_v * static_cast<int64_t>(DataTypeBytes(output_type_)) + 4);
    const int64_t most = MostAnswerBytes(caller_, handlers_->options_);
    if (answer_bytes_ > most - 4096) {
      return Refused(Refusal::kTooLarge,
                     absl::ResourceExhaustedError(absl::StrCat("the answer would have ", answer_bytes_,
                                                               " bytes, beyond max_message_bytes = ", most,
                                                               "; send fewer queries at once")));
    }
    return absl::OkStatus();
  }

  // Takes the memory of all answers that lie in the message: as they are computed, and as they are sent.
  absl::Status ReserveAnswers() const {
    return caller_.memory == nullptr ? absl::OkStatus() : caller_.memory->Add(2 * answer_bytes_);
  }

  // Allocates the answer of a request in place, unless it has one of its own.
  void AddAnswer(v1::AttendResult* result, AttendRequest* request) {
    if (request->out.data != nullptr) return;
    OutgoingTensor output(result->mutable_output(), output_type_,
                          {request->queries, group_->heads, group_->shape.head_dim_v});
    request->out = output.view();
    OutgoingTensor lse(result->mutable_lse(), DataType::kF32, {request->queries, group_->heads});
    request->lse = static_cast<float*>(lse.view().data);
  }

  const LayerGroupSpec& group() const { return *group_; }
  int layer() const { return call_.layer; }

  // `run` is KvCache::Attend or AppendAttend.
  absl::Status RunInStep(const std::vector<AttendRequest>& requests, uint64_t step) {
    if (caller_.declined != nullptr) return caller_.Decline();
    KVTIDE_ASSIGN_OR_RETURN(const OpenSteps::Taken taken, OpenSteps::TakeFrom(caller_.steps, step));
    call_.items = requests;
    return handlers_->cache_->AttendStepLayer(*taken, call_);
  }
  absl::Status RunPinned(const std::vector<AttendRequest>& requests, const Step& step) {
    call_.items = requests;
    return handlers_->cache_->AttendPinned(step, call_);
  }
  absl::Status Run(const std::vector<AttendRequest>& requests,
                   absl::Status (KvCache::*run)(const AttendCall&)) {
    call_.items = requests;
    if (caller_.declined != nullptr && handlers_->cache_->EstimateWork(call_) > kBriefWork)
      return caller_.Decline();
    return (handlers_->cache_->*run)(call_);
  }

 private:
  template <class Item>
  absl::Status FindPlaces(const Item& item, AttendRequest* request) const {
    if (!item.has_output_place()) return absl::InvalidArgumentError("lse_place comes without output_place");
    const auto rows = static_cast<uint64_t>(request->queries) * static_cast<uint64_t>(group_->heads);
    const uint64_t bytes =
        rows * static_cast<uint64_t>(group_->shape.head_dim_v) * DataTypeBytes(output_type_);
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const out,
                            TensorMemory::Find(caller_.tensors, item.output_place(), bytes, "output_place"));
    request->out = {out, output_type_};
    if (!item.has_lse_place()) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const lse, TensorMemory::Find(caller_.tensors, item.lse_place(),
                                                                     rows * sizeof(float), "lse_place"));
    request->lse = reinterpret_cast<float*>(lse);
    return absl::OkStatus();
  }

  Handlers* handlers_;
  const v1::AttentionOptions& options_;
  const Call& caller_;
  AttendCall call_;
  SpecPointer spec_;
  const LayerGroupSpec* group_ = nullptr;
  DataType output_type_ = DataType::kF32;
  int64_t answer_bytes_ = 0;
};

namespace {

absl::Status CheckItemCount(int items, size_t most) {
  if (items == 0) return absl::InvalidArgumentError("items is empty");
  if (static_cast<size_t>(items) > most) {
    return absl::InvalidArgumentError(
        absl::StrCat("items has ", items, " entries, at most ", most, " are allowed"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Handlers::Append(const v1::AppendRequest& request, v1::AppendResponse* response,
                              const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const SpecPointer spec, SpecOfSequence(request.sequence_id(), call.context));
  if (request.layers_size() == 0) return absl::InvalidArgumentError("layers is empty");
  if (static_cast<size_t>(request.layers_size()) > spec->layers.size()) {
    return absl::InvalidArgumentError(absl::StrCat("layers has ", request.layers_size(), " entries, model ",
                                                   spec->name, " has ", spec->layers.size(), " layers"));
  }
  std::vector<LayerKv> layers;
  std::vector<bool> seen(spec->layers.size());
  int64_t tokens = 0;
  for (int i = 0; i < request.layers_size(); i++) {
    const std::string name = absl::StrCat("layers[", i, "]");
    auto group = GroupOfLayer(*spec, request.layers(i).layer());
    if (!group.ok()) return Annotate(group.status(), name);
    const size_t layer = static_cast<size_t>(request.layers(i).layer());
    if (seen[layer])
      return absl::InvalidArgumentError(absl::StrCat(name, ": layer ", layer, " occurs twice"));
    seen[layer] = true;
    auto checked = CheckLayerTokens(request.layers(i), **group, call, &tokens);
    if (!checked.ok()) return Annotate(checked.status(), name);
    layers.push_back(*checked);
  }
  AppendCall append;
  append.sequence = request.sequence_id();
  append.start_position = request.start_position();
  append.tokens = tokens;
  append.layers = layers;
  append.token_ids = {request.token_ids().data(), static_cast<size_t>(request.token_ids_size())};
  append.context = &call.context;
  KVTIDE_RETURN_IF_ERROR(cache_->Append(append));
  KVTIDE_ASSIGN_OR_RETURN(const int64_t length, cache_->Length(request.sequence_id(), call.context));
  response->set_tokens(length);
  return absl::OkStatus();
}

absl::Status Handlers::Attend(const v1::AttendRequest& request, v1::AttendResponse* response,
                              const Call& call) {
  KVTIDE_RETURN_IF_ERROR(CheckItemCount(request.items_size(), cache_->options().max_batch_items));
  Batch batch(this, request.layer(), request.options(), call);
  std::optional<OpenSteps::Taken> step;
  if (request.step_id() != 0) {
    if (call.declined != nullptr) return call.Decline();
    KVTIDE_ASSIGN_OR_RETURN(OpenSteps::Taken taken, OpenSteps::TakeFrom(call.steps, request.step_id()));
    step.emplace(std::move(taken));
  }
  std::vector<AttendRequest> requests(static_cast<size_t>(request.items_size()));
  for (int i = 0; i < request.items_size(); i++) {
    const v1::AttendItem& item = request.items(i);
    AttendRequest* out = &requests[static_cast<size_t>(i)];
    const std::string name = absl::StrCat("items[", i, "]");
    KVTIDE_RETURN_IF_ERROR(AnnotateRefused(batch.AddSequence(item.sequence_id(), out), name));
    KVTIDE_RETURN_IF_ERROR(AnnotateRefused(batch.AddQueries(item, out), name));
    const size_t pinned = step.has_value() ? (**step).Find(item.sequence_id(), static_cast<size_t>(i)) : 0;
    if (item.has_first_query_position()) {
      out->first_query_position = item.first_query_position();
    } else if (step.has_value() && pinned < (**step).size()) {
      out->first_query_position = (**step).end(pinned) - out->queries;
    } else {
      auto length = cache_->LayerLength(item.sequence_id(), request.layer(), call.context);
      if (!length.ok()) return AnnotateRefused(length.status(), name);
      out->first_query_position = *length - out->queries;
    }
    if (out->first_query_position < 0) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": the first of ", out->queries,
                                                     " queries would stand at ", out->first_query_position,
                                                     "; set first_query_position"));
    }
  }
  KVTIDE_RETURN_IF_ERROR(batch.ReserveAnswers());
  for (int i = 0; i < request.items_size(); i++) {
    batch.AddAnswer(response->add_results(), &requests[static_cast<size_t>(i)]);
  }
  if (step.has_value()) return batch.RunPinned(requests, **step);
  return batch.Run(requests, &KvCache::Attend);
}

absl::Status Handlers::AppendAttend(const v1::AppendAttendRequest& request,
                                    v1::AppendAttendResponse* response, const Call& call) {
  KVTIDE_RETURN_IF_ERROR(CheckItemCount(request.items_size(), cache_->options().max_batch_items));
  Batch batch(this, request.layer(), request.options(), call);
  std::vector<AttendRequest> requests(static_cast<size_t>(request.items_size()));
  for (int i = 0; i < request.items_size(); i++) {
    const v1::AppendAttendItem& item = request.items(i);
    AttendRequest* out = &requests[static_cast<size_t>(i)];
    const std::string name = absl::StrCat("items[", i, "]");
    KVTIDE_RETURN_IF_ERROR(AnnotateRefused(batch.AddSequence(item.sequence_id(), out), name));
    KVTIDE_RETURN_IF_ERROR(AnnotateRefused(batch.AddQueries(item, out), name));
    const GroupShape& shape = batch.group().shape;
    auto k = CheckTensor(item.k(), "k", shape.kv_heads, shape.head_dim_k, call.tensors);
    if (!k.ok()) return Annotate(k.status(), name);
    auto v = CheckTensor(item.v(), "v", shape.kv_heads, shape.head_dim_v, call.tensors);
    if (!v.ok()) return Annotate(v.status(), name);
    if (k->tokens != out->queries || v->tokens != out->queries) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": q has ", out->queries, " tokens, k has ", k->tokens, ", v has ", v->tokens));
    }
    out->first_query_position = item.start_position();
    out->start_position = item.start_position();
    out->new_tokens = k->tokens;
    out->k = k->view;
    out->k_elements = k->elements;
    out->v = v->view;
    out->v_elements = v->elements;
    out->token_ids = {item.token_ids().data(), static_cast<size_t>(item.token_ids_size())};
  }
  KVTIDE_RETURN_IF_ERROR(batch.ReserveAnswers());
  for (int i = 0; i < request.items_size(); i++) {
    batch.AddAnswer(response->add_results(), &requests[static_cast<size_t>(i)]);
  }
  if (request.step_id() != 0) return batch.RunInStep(requests, request.step_id());
  return batch.Run(requests, &KvCache::AppendAttend);
}

namespace {

// Of an answer beside the tensors' bytes: for each of them and for the message.
constexpr int64_t kFramingBytes = 128;

// The layers that a read asks for, in its order.
absl::StatusOr<std::vector<int>> LayersToRead(const v1::ReadTokensRequest& request, const ModelSpec& spec) {
  std::vector<int> layers(request.layers().begin(), request.layers().end());
  if (layers.empty()) {
    for (size_t layer = 0; layer < spec.layers.size(); layer++) layers.push_back(static_cast<int>(layer));
  }
  if (layers.size() > spec.layers.size()) {
    return absl::InvalidArgumentError(absl::StrCat("layers has ", layers.size(), " entries, model ",
                                                   spec.name, " has ", spec.layers.size(), " layers"));
  }
  std::vector<bool> seen(spec.layers.size());
  for (const int layer : layers) {
    if (layer < 0 || static_cast<size_t>(layer) >= seen.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("layers: ", layer, ", but model ", spec.name, " has layers 0 to ", seen.size() - 1));
    }
    if (seen[static_cast<size_t>(layer)])
      return absl::InvalidArgumentError(absl::StrCat("layers: ", layer, " occurs twice"));
    seen[static_cast<size_t>(layer)] = true;
  }
  return layers;
}

// Memory for rows [tokens][heads][dim], inside the message or at the place that is named.
absl::StatusOr<MutableTensorView> AddRows(v1::Tensor* tensor, DataType type, int64_t tokens, int heads,
                                          int dim) {
  OutgoingTensor rows(tensor, type, {tokens, heads, dim});
  return rows.view();
}
absl::StatusOr<MutableTensorView> RowsAt(const v1::Place& place, const char* name, DataType type,
                                         int64_t tokens, int heads, int dim, const TensorMemory* memory) {
  const uint64_t bytes = static_cast<uint64_t>(tokens) * static_cast<uint64_t>(heads) *
                         static_cast<uint64_t>(dim) * DataTypeBytes(type);
  KVTIDE_ASSIGN_OR_RETURN(std::byte* const at, TensorMemory::Find(memory, place, bytes, name));
  return MutableTensorView(at, type);
}

}  // namespace

absl::Status Handlers::ReadTokens(const v1::ReadTokensRequest& request, v1::ReadTokensResponse* response,
                                  const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const SpecPointer spec, SpecOfSequence(request.sequence_id(), call.context));
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<int> layers, LayersToRead(request, *spec));
  if (request.first_token() < 0 || request.tokens() < 1) {
    return absl::InvalidArgumentError(absl::StrCat("first_token is ", request.first_token(),
                                                   " and tokens is ", request.tokens(),
                                                   "; the least are 0 and 1"));
  }
  DataType type = DataType::kF16;
  if (request.dtype() != v1::DATA_TYPE_UNSPECIFIED) {
    auto asked = DataTypeFromProto(request.dtype());
    if (!asked.ok()) return Annotate(asked.status(), "dtype");
    type = *asked;
  }
  const bool placed = request.k_places_size() + request.v_places_size() > 0;
  if (placed && (request.k_places_size() != static_cast<int>(layers.size()) ||
                 request.v_places_size() != static_cast<int>(layers.size()))) {
    return absl::InvalidArgumentError(absl::StrCat("k_places has ", request.k_places_size(),
                                                   " entries, v_places ", request.v_places_size(), ", for ",
                                                   layers.size(), " layers"));
  }
  int64_t token_bytes = 0;
  for (const int layer : layers) {
    const GroupShape& shape = (*GroupOfLayer(*spec, layer))->shape;
    token_bytes += int64_t{shape.kv_heads} * (shape.head_dim_k + shape.head_dim_v) *
                   static_cast<int64_t>(DataTypeBytes(type));
  }
  const int64_t room =
      MostAnswerBytes(call, options_) - kFramingBytes * (1 + static_cast<int64_t>(layers.size()));
  if (!placed && token_bytes > room) {
    return absl::InvalidArgumentError(
        absl::StrCat("one token of these layers has ", token_bytes,
                     " bytes, more than a message holds; read fewer layers at once"));
  }
  // Nobody takes memory for tokens that are not there.
  KVTIDE_ASSIGN_OR_RETURN(const int64_t length,
                          cache_->LayerLength(request.sequence_id(), layers[0], call.context));
  if (request.first_token() > length || request.tokens() > length - request.first_token()) {
    return absl::OutOfRangeError(absl::StrCat("layer ", layers[0], " has ", length, " tokens, not ",
                                              request.tokens(), " from ", request.first_token(), " on"));
  }
  const int64_t tokens = placed ? request.tokens() : std::min(request.tokens(), room / token_bytes);
  if (!placed && call.memory != nullptr) KVTIDE_RETURN_IF_ERROR(call.memory->Add(2 * tokens * token_bytes));
  response->set_first_token(request.first_token());
  response->set_tokens(tokens);
  std::vector<LayerRead> reads;
  for (size_t i = 0; i < layers.size(); i++) {
    const GroupShape& shape = (*GroupOfLayer(*spec, layers[i]))->shape;
    v1::LayerTokens* out = response->add_layers();
    out->set_layer(layers[i]);
    const int place = static_cast<int>(i);
    KVTIDE_ASSIGN_OR_RETURN(const MutableTensorView k,
                            placed
                                ? RowsAt(request.k_places(place), "k_places", type, tokens, shape.kv_heads,
                                         shape.head_dim_k, call.tensors)
                                : AddRows(out->mutable_k(), type, tokens, shape.kv_heads, shape.head_dim_k));
    KVTIDE_ASSIGN_OR_RETURN(const MutableTensorView v,
                            placed
                                ? RowsAt(request.v_places(place), "v_places", type, tokens, shape.kv_heads,
                                         shape.head_dim_v, call.tensors)
                                : AddRows(out->mutable_v(), type, tokens, shape.kv_heads, shape.head_dim_v));
    reads.push_back({layers[i], k, v});
  }
  ReadCall read;
  read.sequence = request.sequence_id();
  read.first_token = request.first_token();
  read.tokens = tokens;
  read.layers = reads;
  read.context = &call.context;
  return cache_->ReadTokens(read);
}

}  // namespace kvtide::service
