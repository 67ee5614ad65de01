// The embedded way: a KvCache with its backends in this process. Verbs that carry tensors go to the cache as
// they are; all others go through the daemon's own handlers, so that defaults, checks and words are the same.
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "clients/cpp/convert.h"
#include "clients/python/pool.h"
#include "daemon/backends.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/cache/tensor_check.h"
#include "daemon/config.h"
#include "daemon/host_memory.h"
#include "daemon/service/handlers.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::python {
namespace {

using client::SequenceId;

absl::Status CheckShape(const client::TensorRef& tensor, const char* name, int heads, int dim) {
  const std::vector<int64_t>& shape = tensor.shape;
  if (shape.size() == 3 && shape[0] >= 1 && shape[1] == heads && shape[2] == dim) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": the shape is [", absl::StrJoin(shape, ", "),
                                                 "], expected [tokens, ", heads, ", ", dim,
                                                 "] with at least one token"));
}

TensorView View(const client::TensorRef& tensor) { return {tensor.data, tensor.type}; }

class EmbeddedPool : public Pool {
 public:
  static absl::StatusOr<std::unique_ptr<Pool>> Create(DaemonOptions options) {
    std::unique_ptr<EmbeddedPool> pool(new EmbeddedPool());
    KVTIDE_ASSIGN_OR_RETURN(pool->backends_, MakeBackends(options.devices, options.compute_threads));
    KVTIDE_RETURN_IF_ERROR(CheckHostMemory(
        options.host_bytes + pool->backends_.cpu_devices * options.device_bytes, ReadHostMemory()));
    for (const auto& device : pool->backends_.devices) {
      options.cache.tiers.push_back(
          {"device", device.get(), static_cast<size_t>(options.device_bytes), false, device->name()});
    }
    if (options.host_bytes > 0) {
      options.cache.tiers.push_back(
          {"host", pool->backends_.Host(), static_cast<size_t>(options.host_bytes), false, "cpu"});
    }
    KVTIDE_ASSIGN_OR_RETURN(pool->cache_, KvCache::Create(options.cache));
    pool->handlers_ = std::make_unique<service::Handlers>(pool->cache_.get(), options.service);
    return std::unique_ptr<Pool>(std::move(pool));
  }

  const std::string& address() const override { return address_; }

  absl::StatusOr<client::ServerInfo> GetServerInfo() override {
    v1::GetServerInfoResponse response;
    KVTIDE_RETURN_IF_ERROR(Call(&service::Handlers::GetServerInfo, v1::GetServerInfoRequest(), &response));
    return client::FromProto(response);
  }
  absl::Status RegisterModel(const client::Model& model) override {
    v1::RegisterModelRequest request;
    client::ToProto(model, request.mutable_model());
    v1::RegisterModelResponse response;
    return Call(&service::Handlers::RegisterModel, request, &response);
  }
  absl::StatusOr<SequenceId> CreateSequence(const std::string& model,
                                            const client::SequenceOptions& options) override {
    v1::CreateSequenceRequest request;
    request.set_model(model);
    client::ToProto(options, &request);
    v1::CreateSequenceResponse response;
    KVTIDE_RETURN_IF_ERROR(Call(&service::Handlers::CreateSequence, request, &response));
    return response.sequence_id();
  }
  absl::StatusOr<SequenceId> ForkSequence(SequenceId sequence) override {
    return cache_->ForkSequence(sequence);
  }
  absl::Status TruncateSequence(SequenceId sequence, int64_t tokens) override {
    return cache_->TruncateSequence(sequence, tokens);
  }
  absl::Status CloseSequence(SequenceId sequence) override { return cache_->CloseSequence(sequence); }

  absl::StatusOr<int64_t> Append(SequenceId sequence, int64_t start_position,
                                 std::span<const client::LayerTokens> layers) override {
    KVTIDE_ASSIGN_OR_RETURN(const Spec spec, SpecOf(sequence));
    if (layers.empty()) return absl::InvalidArgumentError("the append has no layers");
    AppendCall call;
    call.sequence = sequence;
    call.start_position = start_position;
    std::vector<LayerKv> parts;
    for (const client::LayerTokens& layer : layers) {
      const std::string place = absl::StrCat("layer ", layer.layer);
      KVTIDE_ASSIGN_OR_RETURN(const LayerGroupSpec* group, GroupOf(*spec, layer.layer));
      KVTIDE_RETURN_IF_ERROR(Annotate(CheckKv(layer.k, layer.v, *group), place));
      if (!parts.empty() && layer.k.shape[0] != call.tokens) {
        return absl::InvalidArgumentError(
            absl::StrCat(place, ": k has ", layer.k.shape[0], " tokens, the layer before has ", call.tokens));
      }
      call.tokens = layer.k.shape[0];
      parts.push_back({layer.layer, View(layer.k), View(layer.v), 0, 0});
    }
    call.layers = parts;
    KVTIDE_RETURN_IF_ERROR(cache_->Append(call));
    return cache_->Length(sequence);
  }

  absl::Status Attend(int layer, std::span<const client::AttendItem> items,
                      const client::AttentionOptions& options) override {
    std::vector<AttendRequest> requests;
    for (const client::AttendItem& item : items) {
      KVTIDE_ASSIGN_OR_RETURN(AttendRequest request, Request(layer, item, requests.size()));
      if (item.first_query_position) {
        request.first_query_position = *item.first_query_position;
      } else {
        KVTIDE_ASSIGN_OR_RETURN(const int64_t length, cache_->LayerLength(item.sequence, layer));
        request.first_query_position = length - request.queries;
      }
      requests.push_back(request);
    }
    return Run(layer, requests, options, &KvCache::Attend);
  }

  absl::Status AppendAttend(int layer, std::span<const client::AppendAttendItem> items,
                            const client::AttentionOptions& options) override {
    std::vector<AttendRequest> requests;
    for (const client::AppendAttendItem& item : items) {
      const std::string place = absl::StrCat("items[", requests.size(), "]");
      KVTIDE_ASSIGN_OR_RETURN(AttendRequest request, Request(layer, item, requests.size()));
      KVTIDE_ASSIGN_OR_RETURN(const Spec spec, SpecOf(item.sequence));
      KVTIDE_ASSIGN_OR_RETURN(const LayerGroupSpec* group, GroupOf(*spec, layer));
      KVTIDE_RETURN_IF_ERROR(Annotate(CheckKv(item.k, item.v, *group), place));
      if (item.k.shape[0] != request.queries) {
        return absl::InvalidArgumentError(
            absl::StrCat(place, ": q has ", request.queries, " tokens, k has ", item.k.shape[0]));
      }
      request.start_position = request.first_query_position = item.start_position;
      request.new_tokens = request.queries;
      request.k = View(item.k);
      request.v = View(item.v);
      requests.push_back(request);
    }
    return Run(layer, requests, options, &KvCache::AppendAttend);
  }

  absl::Status ReadTokens(SequenceId sequence, int layer, int64_t first_token, const ReadTarget& k,
                          const ReadTarget& v) override {
    KVTIDE_ASSIGN_OR_RETURN(const Spec spec, SpecOf(sequence));
    KVTIDE_ASSIGN_OR_RETURN(const LayerGroupSpec* group, GroupOf(*spec, layer));
    KVTIDE_RETURN_IF_ERROR(CheckKv({k.data, k.type, k.shape}, {v.data, v.type, v.shape}, *group));
    const LayerRead read{layer, {k.data, k.type}, {v.data, v.type}};
    ReadCall call;
    call.sequence = sequence;
    call.first_token = first_token;
    call.tokens = k.shape[0];
    call.layers = {&read, 1};
    return cache_->ReadTokens(call);
  }

  absl::StatusOr<client::MoveResult> EvictSequences(std::span<const SequenceId> sequences,
                                                    const client::EvictOptions& options) override {
    v1::EvictSequencesRequest request;
    request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
    request.set_all(sequences.empty());
    request.set_tier(options.tier);
    request.set_drop(options.drop);
    v1::EvictSequencesResponse response;
    KVTIDE_RETURN_IF_ERROR(Call(&service::Handlers::EvictSequences, request, &response));
    return client::MoveResult{response.blocks(), response.bytes(), response.dropped_blocks(),
                              response.blocks_left(), response.shared_blocks()};
  }
  absl::StatusOr<client::MoveResult> PrefetchSequences(std::span<const SequenceId> sequences) override {
    v1::PrefetchSequencesRequest request;
    request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
    v1::PrefetchSequencesResponse response;
    KVTIDE_RETURN_IF_ERROR(Call(&service::Handlers::PrefetchSequences, request, &response));
    return client::MoveResult{response.blocks(), response.bytes(), 0, response.blocks_left(), 0};
  }
  absl::StatusOr<client::PersistResult> PersistSequences(std::span<const SequenceId> sequences) override {
    v1::PersistSequencesRequest request;
    request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
    v1::PersistSequencesResponse response;
    KVTIDE_RETURN_IF_ERROR(Call(&service::Handlers::PersistSequences, request, &response));
    return client::PersistResult{response.sequences(), response.tokens(), response.blocks(),
                                 response.bytes()};
  }
  absl::StatusOr<std::vector<client::SequenceInfo>> ListSequences(const std::string& model) override {
    std::vector<client::SequenceInfo> sequences;
    v1::ListSequencesResponse response;
    do {
      v1::ListSequencesRequest request;
      request.set_page_size(1000);
      request.set_page_token(response.next_page_token());
      request.set_model(model);
      response.Clear();
      KVTIDE_RETURN_IF_ERROR(Call(&service::Handlers::ListSequences, request, &response));
      for (const v1::Sequence& sequence : response.sequences())
        sequences.push_back(client::FromProto(sequence));
    } while (!response.next_page_token().empty());
    return sequences;
  }
  absl::StatusOr<client::ServerStats> GetStats() override {
    v1::GetStatsResponse response;
    KVTIDE_RETURN_IF_ERROR(Call(&service::Handlers::GetStats, v1::GetStatsRequest(), &response));
    return client::FromProto(response);
  }
  absl::StatusOr<client::PlanAnswer> Plan(const client::PlanQuestion& question) override {
    v1::PlanRequest request;
    client::ToProto(question, &request);
    v1::PlanResponse response;
    KVTIDE_RETURN_IF_ERROR(Call(&service::Handlers::Plan, request, &response));
    return client::FromProto(response);
  }

 private:
  using Spec = std::shared_ptr<const ModelSpec>;

  EmbeddedPool() = default;

  // A verb of the daemon's handlers, called by this process for as long as it takes.
  template <class Request, class Response, class Caller>
  absl::Status Call(absl::Status (service::Handlers::*verb)(const Request&, Response*, const Caller&),
                    const Request& request, Response* response) {
    const Caller caller;
    return (handlers_.get()->*verb)(request, response, caller);
  }

  // The spec of a sequence's model; models never change, so they are kept once asked for.
  absl::StatusOr<Spec> SpecOf(SequenceId sequence) {
    KVTIDE_ASSIGN_OR_RETURN(const ModelId model, cache_->ModelOf(sequence));
    MutexLock lock(mu_);
    Spec& spec = specs_[model];
    if (spec == nullptr) {
      KVTIDE_ASSIGN_OR_RETURN(ModelSpec copy, cache_->GetModel(model));
      spec = std::make_shared<const ModelSpec>(std::move(copy));
    }
    return spec;
  }

  static absl::StatusOr<const LayerGroupSpec*> GroupOf(const ModelSpec& spec, int layer) {
    if (layer < 0 || static_cast<size_t>(layer) >= spec.layers.size()) {
      return absl::InvalidArgumentError(absl::StrCat("layer is ", layer, ", model ", spec.name,
                                                     " has layers 0 to ", spec.layers.size() - 1));
    }
    return &spec.groups[static_cast<size_t>(spec.layers[static_cast<size_t>(layer)].group)];
  }

  static absl::Status CheckKv(const client::TensorRef& k, const client::TensorRef& v,
                              const LayerGroupSpec& group) {
    KVTIDE_RETURN_IF_ERROR(CheckShape(k, "k", group.shape.kv_heads, group.shape.head_dim_k));
    KVTIDE_RETURN_IF_ERROR(CheckShape(v, "v", group.shape.kv_heads, group.shape.head_dim_v));
    if (k.shape[0] == v.shape[0]) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("k has ", k.shape[0], " tokens, v has ", v.shape[0]));
  }

  // What Attend and AppendAttend have in common: the queries and where the results go.
  template <class Item>
  absl::StatusOr<AttendRequest> Request(int layer, const Item& item, size_t index) {
    const std::string place = absl::StrCat("items[", index, "]");
    auto spec = SpecOf(item.sequence);
    if (!spec.ok()) return Annotate(spec.status(), place);
    KVTIDE_ASSIGN_OR_RETURN(const LayerGroupSpec* group, GroupOf(**spec, layer));
    KVTIDE_RETURN_IF_ERROR(Annotate(CheckShape(item.q, "q", group->heads, group->shape.head_dim_k), place));
    KVTIDE_RETURN_IF_ERROR(Annotate(
        CheckFinite(View(item.q), item.q.shape[0], group->heads, group->shape.head_dim_k, "q", layer, 0),
        place));
    const auto rows = static_cast<size_t>(item.q.shape[0]) * static_cast<size_t>(group->heads);
    if (item.output.size() != rows * static_cast<size_t>(group->shape.head_dim_v) ||
        (!item.lse.empty() && item.lse.size() != rows)) {
      return absl::InvalidArgumentError(absl::StrCat(
          place, ": output has ", item.output.size(), " values and lse ", item.lse.size(),
          ", the answer has ", rows * static_cast<size_t>(group->shape.head_dim_v), " and ", rows));
    }
    AttendRequest request;
    request.sequence = item.sequence;
    request.q = View(item.q);
    request.queries = item.q.shape[0];
    request.out = item.output.data();
    request.lse = item.lse.empty() ? nullptr : item.lse.data();
    return request;
  }

  absl::Status Run(int layer, const std::vector<AttendRequest>& requests,
                   const client::AttentionOptions& options,
                   absl::Status (KvCache::*verb)(const AttendCall&)) {
    if (requests.empty()) return absl::InvalidArgumentError("the call has no items");
    KVTIDE_ASSIGN_OR_RETURN(const Spec spec, SpecOf(requests[0].sequence));
    KVTIDE_ASSIGN_OR_RETURN(const LayerGroupSpec* group, GroupOf(*spec, layer));
    if (!options.sinks.empty() && options.sinks.size() != static_cast<size_t>(group->heads)) {
      return absl::InvalidArgumentError(absl::StrCat("options.sinks has ", options.sinks.size(),
                                                     " values, the layer has ", group->heads,
                                                     " query heads"));
    }
    AttendCall call;
    call.layer = layer;
    call.items = requests;
    call.causal = options.causal.value_or(true);
    call.scale = options.scale;
    call.softcap = options.softcap;
    call.window = options.window;
    call.sinks = options.sinks.empty() ? nullptr : options.sinks.data();
    return (cache_.get()->*verb)(call);
  }

  const std::string address_ = "embedded";
  Backends backends_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<service::Handlers> handlers_;
  Mutex mu_;
  std::map<ModelId, Spec> specs_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<Pool>> MakeEmbeddedPool(const std::string& config_json) {
  KVTIDE_ASSIGN_OR_RETURN(const v1::KvtidedConfig config, ParseConfig(config_json, "(embedded pool)"));
  KVTIDE_ASSIGN_OR_RETURN(DaemonOptions options, ResolveConfig(config));
  return EmbeddedPool::Create(std::move(options));
}

}  // namespace kvtide::python
