#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "clients/python/pool.h"
#include "kernels/base/status.h"

namespace kvtide::python {
namespace {

absl::Status Copy(const char* name, const std::vector<std::byte>& rows, int heads, int dim,
                  const ReadTarget& target) {
  const std::vector<int64_t> shape = {target.shape.empty() ? 0 : target.shape[0], heads, dim};
  if (target.shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": the shape is [",
                                                   absl::StrJoin(target.shape, ", "), "], expected [tokens, ",
                                                   heads, ", ", dim, "]"));
  }
  if (rows.size() != static_cast<size_t>(shape[0] * heads * dim) * DataTypeBytes(target.type))
    return absl::InternalError(absl::StrCat(name, ": the answer has ", rows.size(), " bytes"));
  std::memcpy(target.data, rows.data(), rows.size());
  return absl::OkStatus();
}

absl::Status Read(client::Client& from, client::SequenceId sequence, int layer, int64_t first_token,
                  const ReadTarget& k, const ReadTarget& v) {
  if (k.shape.size() != 3 || v.shape.size() != 3 || k.shape[0] < 1 || k.shape[0] != v.shape[0] ||
      k.type != v.type) {
    return absl::InvalidArgumentError(
        "k and v: expected [tokens, kv_heads, head_dim] of one type with the same tokens, at least one");
  }
  auto layers = from.ReadTokens(sequence, {&layer, 1}, first_token, k.shape[0], k.type);
  if (!layers.ok()) return layers.status();
  if (layers->size() != 1) return absl::InternalError("asked for one layer, got another number");
  const auto& rows = layers->front();
  KVTIDE_RETURN_IF_ERROR(Copy("k", rows.k, rows.kv_heads, rows.head_dim_k, k));
  return Copy("v", rows.v, rows.kv_heads, rows.head_dim_v, v);
}

class DaemonPool : public Pool {
 public:
  explicit DaemonPool(std::unique_ptr<client::Client> client) : client_(std::move(client)) {}

  const std::string& address() const override { return client_->address(); }
  absl::StatusOr<client::ServerInfo> GetServerInfo() override { return client_->GetServerInfo(); }
  absl::Status RegisterModel(const client::Model& model) override { return client_->RegisterModel(model); }
  absl::StatusOr<client::SequenceId> CreateSequence(const std::string& model,
                                                    const client::SequenceOptions& options) override {
    return client_->CreateSequence(model, options);
  }
  absl::StatusOr<client::SequenceId> ForkSequence(client::SequenceId sequence) override {
    return client_->ForkSequence(sequence);
  }
  absl::Status TruncateSequence(client::SequenceId sequence, int64_t tokens) override {
    return client_->TruncateSequence(sequence, tokens);
  }
  absl::Status CloseSequence(client::SequenceId sequence) override {
    return client_->CloseSequence(sequence);
  }
  absl::StatusOr<int64_t> Append(client::SequenceId sequence, int64_t start_position,
                                 std::span<const client::LayerTokens> layers) override {
    return client_->Append(sequence, start_position, layers);
  }
  absl::Status Attend(int layer, std::span<const client::AttendItem> items,
                      const client::AttentionOptions& options) override {
    return client_->Attend(layer, items, options);
  }
  absl::Status AppendAttend(int layer, std::span<const client::AppendAttendItem> items,
                            const client::AttentionOptions& options) override {
    return client_->AppendAttend(layer, items, options);
  }
  absl::Status ReadTokens(client::SequenceId sequence, int layer, int64_t first_token, const ReadTarget& k,
                          const ReadTarget& v) override {
    return Read(*client_, sequence, layer, first_token, k, v);
  }
  absl::StatusOr<client::MoveResult> EvictSequences(std::span<const client::SequenceId> sequences,
                                                    const client::EvictOptions& options) override {
    return sequences.empty() ? client_->EvictAll(options) : client_->EvictSequences(sequences, options);
  }
  absl::StatusOr<client::MoveResult> PrefetchSequences(
      std::span<const client::SequenceId> sequences) override {
    return client_->PrefetchSequences(sequences);
  }
  absl::StatusOr<client::PersistResult> PersistSequences(
      std::span<const client::SequenceId> sequences) override {
    return client_->PersistSequences(sequences);
  }
  absl::StatusOr<std::vector<client::SequenceInfo>> ListSequences(const std::string& model) override {
    return client_->ListSequences(model);
  }
  absl::StatusOr<client::ServerStats> GetStats() override { return client_->GetStats(); }
  absl::StatusOr<client::PlanAnswer> Plan(const client::PlanQuestion& question) override {
    return client_->Plan(question);
  }

 private:
  const std::unique_ptr<client::Client> client_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Pool>> ConnectDaemon(const std::string& address,
                                                    const client::ClientOptions& options) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<client::Client> client, client::Client::Connect(address, options));
  return std::make_unique<DaemonPool>(std::move(client));
}

}  // namespace kvtide::python
