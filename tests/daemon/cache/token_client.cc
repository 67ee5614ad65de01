#include "tests/daemon/cache/token_client.h"

#include <xxhash.h>

#include "kernels/base/status.h"

namespace kvtide::testing {

Tokens SomeTokens(uint32_t seed, size_t count) {
  std::mt19937 random(seed);
  Tokens tokens(count);
  for (TokenId& id : tokens) id = random() % 50'000;
  return tokens;
}

Tokens operator+(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TokenClient::TokenClient(KvCache& cache, const ModelSpec& model, const SequenceOptions& options,
                         const CallContext& context)
    : cache_(&cache),
      spec_(model),
      options_(options),
      context_(context),
      model_id_(cache.RegisterModel(model, context).value()) {
  id_ = cache.CreateSequence(model_id_, options, context).value();
}

absl::StatusOr<PrefixReport> TokenClient::Lookup(const Tokens& tokens, absl::Duration lease) {
  PrefixCall call;
  call.model = model_id_;
  call.options = options_;
  call.token_ids = tokens;
  call.lease = lease;
  call.context = &context_;
  return cache_->LookupPrefix(call);
}

absl::StatusOr<int64_t> TokenClient::Begin(const Tokens& tokens) {
  KVTIDE_ASSIGN_OR_RETURN(const PrefixReport found, Lookup(tokens));
  KVTIDE_ASSIGN_OR_RETURN(const SequenceId id,
                          cache_->CreateSequence(model_id_, options_, context_, found.lease));
  KVTIDE_RETURN_IF_ERROR(cache_->CloseSequence(id_, context_));
  id_ = id;
  KVTIDE_ASSIGN_OR_RETURN(const int64_t length, cache_->Length(id, context_));
  if (length != found.tokens) return absl::InternalError("the sequence has another length");
  tokens_.assign(tokens.begin(), tokens.begin() + length);
  if (length == static_cast<int64_t>(tokens.size())) return length;
  KVTIDE_RETURN_IF_ERROR(Append({tokens.begin() + length, tokens.end()}));
  return length;
}

NewRows TokenClient::Rows(int layer, const Tokens& next) const {
  std::mt19937 unused(1);
  NewRows rows(spec_, layer, static_cast<int64_t>(next.size()), unused);
  const size_t k_row = rows.k.size() / next.size(), v_row = rows.v.size() / next.size();
  // One hash after the other, so that the number of appends makes no difference.
  uint64_t history = 0;
  for (const TokenId id : tokens_) history = XXH3_64bits_withSeed(&id, sizeof id, history);
  for (size_t t = 0; t < next.size(); t++) {
    history = XXH3_64bits_withSeed(&next[t], sizeof(TokenId), history);
    std::mt19937 random(static_cast<uint32_t>(history) + static_cast<uint32_t>(layer));
    const std::vector<float> k = RandomRows(random, k_row), v = RandomRows(random, v_row);
    std::copy(k.begin(), k.end(), rows.k.begin() + static_cast<ptrdiff_t>(t * k_row));
    std::copy(v.begin(), v.end(), rows.v.begin() + static_cast<ptrdiff_t>(t * v_row));
  }
  return rows;
}

absl::Status TokenClient::Append(const Tokens& tokens, bool say) {
  std::vector<NewRows> rows;
  std::vector<LayerKv> layers;
  for (int layer = 0; layer < static_cast<int>(spec_.layers.size()); layer++)
    rows.push_back(Rows(layer, tokens));
  for (const NewRows& of_layer : rows) layers.push_back(of_layer.Kv());
  AppendCall call;
  call.sequence = id_;
  call.start_position = static_cast<int64_t>(tokens_.size());
  call.tokens = static_cast<int64_t>(tokens.size());
  call.layers = layers;
  if (say) call.token_ids = tokens;
  call.context = &context_;
  KVTIDE_RETURN_IF_ERROR(cache_->Append(call));
  tokens_ = tokens_ + tokens;
  return absl::OkStatus();
}

absl::Status TokenClient::Step(const Tokens& tokens) {
  std::mt19937 random(3);
  const auto position = static_cast<int64_t>(tokens_.size());
  for (int layer = 0; layer < static_cast<int>(spec_.layers.size()); layer++) {
    const NewRows rows = Rows(layer, tokens);
    LayerCall call(spec_, layer, id_, static_cast<int64_t>(tokens.size()), position, random);
    call.Append(rows);
    AttendRequest item = call.call().items.front();
    if (layer == 0) item.token_ids = tokens;
    AttendCall with_ids = call.call();
    with_ids.items = {&item, 1};
    with_ids.context = &context_;
    KVTIDE_RETURN_IF_ERROR(cache_->AppendAttend(with_ids));
  }
  tokens_ = tokens_ + tokens;
  return absl::OkStatus();
}

std::vector<float> TokenClient::Read() {
  const absl::StatusOr<std::vector<float>> all = TryRead();
  EXPECT_TRUE(all.ok()) << all.status();
  return all.ok() ? *all : std::vector<float>();
}

absl::StatusOr<std::vector<float>> TokenClient::TryRead() {
  std::vector<float> all;
  const auto length = static_cast<int64_t>(tokens_.size());
  for (int layer = 0; layer < static_cast<int>(spec_.layers.size()); layer++) {
    const LayerGroupSpec& group = GroupOf(spec_, layer);
    const int64_t first = FirstLiveBlock(length, group.window) * kBlockTokens;
    const auto rows = static_cast<size_t>((length - first) * group.shape.kv_heads);
    std::vector<float> k(rows * static_cast<size_t>(group.shape.head_dim_k)),
        v(rows * static_cast<size_t>(group.shape.head_dim_v));
    const LayerRead read{layer, MutableTensorView(k.data()), MutableTensorView(v.data())};
    ReadCall call;
    call.sequence = id_;
    call.first_token = first;
    call.tokens = length - first;
    call.layers = {&read, 1};
    call.context = &context_;
    KVTIDE_RETURN_IF_ERROR(cache_->ReadTokens(call));
    all.insert(all.end(), k.begin(), k.end());
    all.insert(all.end(), v.begin(), v.end());
  }
  return all;
}

std::vector<float> TokenClient::Attend() {
  std::vector<float> all;
  std::mt19937 random(17);
  for (int layer = 0; layer < static_cast<int>(spec_.layers.size()); layer++) {
    LayerCall call(spec_, layer, id_, 1, static_cast<int64_t>(tokens_.size()), random);
    call.call().context = &context_;
    const absl::Status status = cache_->Attend(call.call());
    EXPECT_TRUE(status.ok()) << status;
    all.insert(all.end(), call.out.begin(), call.out.end());
    all.insert(all.end(), call.lse.begin(), call.lse.end());
  }
  return all;
}

absl::Status TokenClient::Truncate(int64_t tokens) {
  KVTIDE_RETURN_IF_ERROR(cache_->TruncateSequence(id_, tokens, context_));
  tokens_.resize(static_cast<size_t>(tokens));
  return absl::OkStatus();
}

absl::Status TokenClient::Close() { return cache_->CloseSequence(id_, context_); }

std::vector<float> ReadAlone(KvCache& cache, const ModelSpec& model, const SequenceOptions& options,
                             const Tokens& tokens) {
  TokenClient alone(cache, model, options);
  EXPECT_TRUE(alone.Append(tokens, false).ok());
  std::vector<float> values = alone.Read();
  EXPECT_TRUE(alone.Close().ok());
  return values;
}

}  // namespace kvtide::testing
