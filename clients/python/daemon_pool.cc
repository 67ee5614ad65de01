#include <utility>

#include "clients/python/pool.h"
#include "kernels/base/status.h"

namespace kvtide::python {
namespace {

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
  absl::Status ReadTokens(client::SequenceId, int, int64_t, const ReadTarget&, const ReadTarget&) override {
    return absl::UnimplementedError("this client cannot read tokens from a kvtided; an embedded pool can");
  }
  absl::StatusOr<client::MoveResult> EvictSequences(std::span<const client::SequenceId> sequences,
                                                    const client::EvictOptions& options) override {
    return sequences.empty() ? client_->EvictAll(options) : client_->EvictSequences(sequences, options);
  }
  absl::StatusOr<client::MoveResult> PrefetchSequences(
      std::span<const client::SequenceId> sequences) override {
    return client_->PrefetchSequences(sequences);
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
