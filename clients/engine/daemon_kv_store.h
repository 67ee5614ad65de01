// A KvStore whose keys and values live in kvtided, or in another pool (clients/cpp/pool.h): every layer of
// every chunk is one AppendAttend call, or a few when a message would be too large. Nothing of a sequence
// stays in this process but its id. The client is borrowed. Sequences that are still open when the store is
// destroyed are closed.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "clients/cpp/client.h"
#include "clients/engine/kv_store.h"

namespace kvtide::engine {

// The transforms of a layer as its model is registered, or a profile installed, with them.
void SetKeyTransforms(const KeyTransforms& keys, client::ModelLayer* layer);

class DaemonKvStore : public KvStore {
 public:
  // Registers the model under `model_name` (fine when it is registered already with the same shape).
  // Sequences are created with `options`. Statuses are those of the daemon.
  static absl::StatusOr<std::unique_ptr<DaemonKvStore>> Create(client::Client& client,
                                                               const std::string& model_name,
                                                               const KvGeometry& geometry,
                                                               client::SequenceOptions options);
  ~DaemonKvStore() override;

  const KvGeometry& geometry() const override { return geometry_; }
  absl::StatusOr<SequenceId> CreateSequence() override;
  // A sequence that begins with the longest prefix of `tokens` that the daemon has cached, the last token
  // left out: the rest is the caller's to compute.
  struct Begun {
    SequenceId sequence = 0;
    int64_t tokens = 0;
    std::vector<std::pair<std::string, int64_t>> tiers;  // where they were
  };
  absl::StatusOr<Begun> Begin(std::span<const int32_t> tokens);
  // Said with the next layer that is appended there.
  void NextTokens(SequenceId sequence, int64_t start, std::span<const int32_t> tokens) override;
  absl::Status AppendAttend(SequenceId sequence, int layer, int64_t start, int n_tokens, const float* q,
                            const float* k, const float* v, float* out) override;
  absl::StatusOr<SequenceId> Fork(SequenceId sequence) override;
  absl::Status Truncate(SequenceId sequence, int64_t length) override;
  absl::Status Close(SequenceId sequence) override;

  // What the daemon says of a sequence: tokens, blocks and bytes per tier.
  absl::StatusOr<client::SequenceInfo> Describe(SequenceId sequence);

 private:
  DaemonKvStore(client::Client& client, std::string model_name, const KvGeometry& geometry,
                client::SequenceOptions options, int tokens_per_call);

  client::Client& client_;
  const std::string model_name_;
  const KvGeometry geometry_;
  const client::SequenceOptions options_;
  const int tokens_per_call_;
  std::set<SequenceId> open_;
  // Of NextTokens.
  SequenceId next_sequence_ = 0;
  int64_t next_start_ = 0;
  std::vector<client::TokenId> next_tokens_;
};

// The model's shape in the words of the client library.
client::Model ClientModel(const std::string& name, const KvGeometry& geometry);

}  // namespace kvtide::engine
