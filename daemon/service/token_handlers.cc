// The verbs that carry tensors: Append, Attend, AppendAttend.
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/service/handlers.h"
#include "kernels/base/status.h"
#include "proto/data_type.h"

namespace kvtide::service {
namespace {

absl::StatusOr<LayerKv> CheckLayerTokens(const v1::LayerTokens& tokens, const LayerGroupSpec& group,
                                         int64_t* count) {
  KVTIDE_ASSIGN_OR_RETURN(const IncomingTensor k,
                          CheckTensor(tokens.k(), "k", group.shape.kv_heads, group.shape.head_dim_k));
  KVTIDE_ASSIGN_OR_RETURN(const IncomingTensor v,
                          CheckTensor(tokens.v(), "v", group.shape.kv_heads, group.shape.head_dim_v));
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
    if (options.window() < 0)
      return absl::InvalidArgumentError(absl::StrCat("options.window is ", options.window()));
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
  Batch(Handlers* handlers, int layer, const v1::AttentionOptions& options)
      : handlers_(handlers), options_(options) {
    call_.layer = layer;
  }

  // The first sequence decides the model, the others must have the same.
  absl::Status AddSequence(SequenceId sequence, AttendRequest* request) {
    KVTIDE_ASSIGN_OR_RETURN(const SpecPointer spec, handlers_->SpecOfSequence(sequence));
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

  absl::Status AddQueries(const v1::Tensor& q, AttendRequest* request) {
    KVTIDE_ASSIGN_OR_RETURN(const IncomingTensor tensor,
                            CheckTensor(q, "q", group_->heads, group_->shape.head_dim_k));
    KVTIDE_RETURN_IF_ERROR(CheckFinite(tensor, "q", group_->heads, group_->shape.head_dim_k));
    request->q = tensor.view;
    request->q_elements = tensor.elements;
    request->queries = tensor.tokens;
    answer_bytes_ += tensor.tokens * group_->heads *
                     (group_->shape.head_dim_v * static_cast<int64_t>(DataTypeBytes(output_type_)) + 4);
    if (answer_bytes_ > handlers_->options_.max_message_bytes - 4096) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the answer would have ", answer_bytes_, " bytes, beyond max_message_bytes = ",
                       handlers_->options_.max_message_bytes, "; send fewer queries at once"));
    }
    return absl::OkStatus();
  }

  // Allocates the answer of a request in place.
  void AddAnswer(v1::AttendResult* result, AttendRequest* request) {
    outputs_.emplace_back(result->mutable_output(), output_type_,
                          std::vector<int64_t>{request->queries, group_->heads, group_->shape.head_dim_v});
    request->out = outputs_.back().data();
    OutgoingTensor lse(result->mutable_lse(), DataType::kF32, {request->queries, group_->heads});
    request->lse = lse.data();
  }

  const LayerGroupSpec& group() const { return *group_; }
  int layer() const { return call_.layer; }

  // `run` is KvCache::Attend or AppendAttend.
  absl::Status Run(const std::vector<AttendRequest>& requests, const Cancelled& cancelled,
                   absl::Status (KvCache::*run)(const AttendCall&)) {
    call_.items = requests;
    CallContext context;
    context.cancellation = &cancelled;
    call_.context = &context;
    KVTIDE_RETURN_IF_ERROR((handlers_->cache_->*run)(call_));
    for (OutgoingTensor& output : outputs_) output.Finish();
    return absl::OkStatus();
  }

 private:
  Handlers* handlers_;
  const v1::AttentionOptions& options_;
  AttendCall call_;
  SpecPointer spec_;
  const LayerGroupSpec* group_ = nullptr;
  DataType output_type_ = DataType::kF32;
  int64_t answer_bytes_ = 0;
  std::vector<OutgoingTensor> outputs_;
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
                              const Cancelled& cancelled) {
  KVTIDE_ASSIGN_OR_RETURN(const SpecPointer spec, SpecOfSequence(request.sequence_id()));
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
    auto checked = CheckLayerTokens(request.layers(i), **group, &tokens);
    if (!checked.ok()) return Annotate(checked.status(), name);
    layers.push_back(*checked);
  }
  AppendCall call;
  call.sequence = request.sequence_id();
  call.start_position = request.start_position();
  call.tokens = tokens;
  call.layers = layers;
  CallContext context;
  context.cancellation = &cancelled;
  call.context = &context;
  KVTIDE_RETURN_IF_ERROR(cache_->Append(call));
  KVTIDE_ASSIGN_OR_RETURN(const int64_t length, cache_->Length(request.sequence_id()));
  response->set_tokens(length);
  return absl::OkStatus();
}

absl::Status Handlers::Attend(const v1::AttendRequest& request, v1::AttendResponse* response,
                              const Cancelled& cancelled) {
  KVTIDE_RETURN_IF_ERROR(CheckItemCount(request.items_size(), cache_->options().max_batch_items));
  Batch batch(this, request.layer(), request.options());
  std::vector<AttendRequest> requests(static_cast<size_t>(request.items_size()));
  for (int i = 0; i < request.items_size(); i++) {
    const v1::AttendItem& item = request.items(i);
    AttendRequest* out = &requests[static_cast<size_t>(i)];
    const std::string name = absl::StrCat("items[", i, "]");
    KVTIDE_RETURN_IF_ERROR(Annotate(batch.AddSequence(item.sequence_id(), out), name));
    KVTIDE_RETURN_IF_ERROR(Annotate(batch.AddQueries(item.q(), out), name));
    if (item.has_first_query_position()) {
      out->first_query_position = item.first_query_position();
    } else {
      auto length = cache_->LayerLength(item.sequence_id(), request.layer());
      if (!length.ok()) return Annotate(length.status(), name);
      out->first_query_position = *length - out->queries;
    }
    if (out->first_query_position < 0) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": the first of ", out->queries,
                                                     " queries would stand at ", out->first_query_position,
                                                     "; set first_query_position"));
    }
  }
  for (int i = 0; i < request.items_size(); i++) {
    batch.AddAnswer(response->add_results(), &requests[static_cast<size_t>(i)]);
  }
  return batch.Run(requests, cancelled, &KvCache::Attend);
}

absl::Status Handlers::AppendAttend(const v1::AppendAttendRequest& request,
                                    v1::AppendAttendResponse* response, const Cancelled& cancelled) {
  KVTIDE_RETURN_IF_ERROR(CheckItemCount(request.items_size(), cache_->options().max_batch_items));
  Batch batch(this, request.layer(), request.options());
  std::vector<AttendRequest> requests(static_cast<size_t>(request.items_size()));
  for (int i = 0; i < request.items_size(); i++) {
    const v1::AppendAttendItem& item = request.items(i);
    AttendRequest* out = &requests[static_cast<size_t>(i)];
    const std::string name = absl::StrCat("items[", i, "]");
    KVTIDE_RETURN_IF_ERROR(Annotate(batch.AddSequence(item.sequence_id(), out), name));
    KVTIDE_RETURN_IF_ERROR(Annotate(batch.AddQueries(item.q(), out), name));
    const GroupShape& shape = batch.group().shape;
    auto k = CheckTensor(item.k(), "k", shape.kv_heads, shape.head_dim_k);
    if (!k.ok()) return Annotate(k.status(), name);
    auto v = CheckTensor(item.v(), "v", shape.kv_heads, shape.head_dim_v);
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
  }
  for (int i = 0; i < request.items_size(); i++) {
    batch.AddAnswer(response->add_results(), &requests[static_cast<size_t>(i)]);
  }
  return batch.Run(requests, cancelled, &KvCache::AppendAttend);
}

}  // namespace kvtide::service
