#include "clients/engine/daemon_kv_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::engine {

void SetKeyTransforms(const KeyTransforms& keys, client::ModelLayer* layer) {
  layer->key_transform = keys.matrices;
  layer->key_widths = keys.widths;
  layer->key_centre = keys.centres;
  layer->key_frequencies = keys.frequencies;
  layer->key_rope_neighbours = keys.pairs == RopePairs::kNeighbours;
}

client::Model ClientModel(const std::string& name, const KvGeometry& geometry) {
  client::ModelLayer layer;
  layer.kv_heads = geometry.kv_heads;
  layer.head_dim_k = layer.head_dim_v = geometry.head_dim;
  layer.query_heads = geometry.query_heads;
  layer.scale = geometry.scale();
  layer.softcap = geometry.softcap;
  client::Model model{name, std::vector<client::ModelLayer>(geometry.layers, layer)};
  for (int l = 0; l < geometry.layers; ++l) {
    model.layers[l].window = geometry.window(l);
    if (!geometry.ropes.empty())
      model.layers[l].rope = {geometry.ropes[l].frequencies,
                              geometry.ropes[l].pairs == RopePairs::kNeighbours};
    if (!geometry.key_means.empty()) model.layers[l].key_mean = geometry.key_means[l];
    if (geometry.key_transforms.empty()) continue;
    SetKeyTransforms(geometry.key_transforms[l], &model.layers[l]);
  }
  return model;
}

absl::StatusOr<std::unique_ptr<DaemonKvStore>> DaemonKvStore::Create(client::Client& client,
                                                                     const std::string& model_name,
                                                                     const KvGeometry& geometry,
                                                                     client::SequenceOptions options) {
  KVTIDE_RETURN_IF_ERROR(client.RegisterModel(ClientModel(model_name, geometry)));
  KVTIDE_ASSIGN_OR_RETURN(const client::ServerInfo info, client.GetServerInfo());
  // A request carries q, k and v, the answer the output; together they stay well below the limit of a
  // message, and fit into the arena of a pool that shares memory.
  const int64_t token_bytes = 4 * static_cast<int64_t>(2 * geometry.query_width() + 2 * geometry.kv_width());
  int64_t tokens = std::max<int64_t>(1, info.max_message_bytes * 3 / 4 / token_bytes);
  if (info.max_append_tokens > 0) tokens = std::min(tokens, info.max_append_tokens);
  return std::unique_ptr<DaemonKvStore>(
      new DaemonKvStore(client, model_name, geometry, std::move(options),
                        static_cast<int>(std::min<int64_t>(tokens, 1 << 20))));
}

DaemonKvStore::DaemonKvStore(client::Client& client, std::string model_name, const KvGeometry& geometry,
                             client::SequenceOptions options, int tokens_per_call)
    : client_(client),
      model_name_(std::move(model_name)),
      geometry_(geometry),
      options_(std::move(options)),
      tokens_per_call_(tokens_per_call) {}

DaemonKvStore::~DaemonKvStore() {
  for (const SequenceId sequence : open_) client_.CloseSequence(sequence).IgnoreError();
}

absl::StatusOr<SequenceId> DaemonKvStore::CreateSequence() {
  KVTIDE_ASSIGN_OR_RETURN(const SequenceId sequence, client_.CreateSequence(model_name_, options_));
  open_.insert(sequence);
  return sequence;
}

absl::StatusOr<DaemonKvStore::Begun> DaemonKvStore::Begin(std::span<const int32_t> tokens) {
  Begun begun;
  const std::vector<client::TokenId> ids(tokens.begin(), tokens.end() - (tokens.empty() ? 0 : 1));
  KVTIDE_ASSIGN_OR_RETURN(const client::CachedPrefix prefix,
                          client_.LookupPrefix(model_name_, options_, ids));
  begun.tiers = prefix.tiers;
  KVTIDE_ASSIGN_OR_RETURN(begun.sequence,
                          client_.CreateSequence(model_name_, options_, prefix.lease, &begun.tokens));
  open_.insert(begun.sequence);
  return begun;
}

void DaemonKvStore::NextTokens(SequenceId sequence, int64_t start, std::span<const int32_t> tokens) {
  next_sequence_ = sequence;
  next_start_ = start;
  next_tokens_.assign(tokens.begin(), tokens.end());
}

absl::Status DaemonKvStore::AppendAttend(SequenceId sequence, int layer, int64_t start, int n_tokens,
                                         const float* q, const float* k, const float* v, float* out) {
  const size_t q_width = geometry_.query_width(), kv_width = geometry_.kv_width();
  for (int done = 0; done < n_tokens; done += tokens_per_call_) {
    const int n = std::min(tokens_per_call_, n_tokens - done);
    client::AppendAttendItem item;
    item.sequence = sequence;
    item.start_position = start + done;
    item.q = client::TensorRef::F32({q + done * q_width, n * q_width},
                                    {n, geometry_.query_heads, geometry_.head_dim});
    item.k = client::TensorRef::F32({k + done * kv_width, n * kv_width},
                                    {n, geometry_.kv_heads, geometry_.head_dim});
    item.v = client::TensorRef::F32({v + done * kv_width, n * kv_width},
                                    {n, geometry_.kv_heads, geometry_.head_dim});
    item.output = {out + done * q_width, n * q_width};
    if (layer == 0 && sequence == next_sequence_ && start == next_start_ &&
        next_tokens_.size() == static_cast<size_t>(n_tokens))
      item.token_ids = std::span<const client::TokenId>(next_tokens_).subspan(done, n);
    const absl::Status status = client_.AppendAttend(layer, {&item, 1});
    if (!status.ok()) return Annotate(status, absl::StrCat("layer ", layer, ", tokens from ", start + done));
  }
  return absl::OkStatus();
}

absl::StatusOr<SequenceId> DaemonKvStore::Fork(SequenceId sequence) {
  KVTIDE_ASSIGN_OR_RETURN(const SequenceId fork, client_.ForkSequence(sequence));
  open_.insert(fork);
  return fork;
}

absl::Status DaemonKvStore::Truncate(SequenceId sequence, int64_t length) {
  return client_.TruncateSequence(sequence, length);
}

absl::Status DaemonKvStore::Close(SequenceId sequence) {
  open_.erase(sequence);
  return client_.CloseSequence(sequence);
}

absl::StatusOr<client::SequenceInfo> DaemonKvStore::Describe(SequenceId sequence) {
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<client::SequenceInfo> all, client_.ListSequences(model_name_));
  for (const client::SequenceInfo& info : all) {
    if (info.id == sequence) return info;
  }
  return absl::NotFoundError(absl::StrCat("the daemon holds no sequence ", sequence));
}

}  // namespace kvtide::engine
