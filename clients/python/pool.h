// What the Python module sees of a place that keeps keys and values: the verbs of kvtide.v1 with the plain
// structs of clients/cpp, whichever way they go. Two ways exist: a kvtided over gRPC, and a cache inside this
// process. Both check the same things with the same words, so that a caller can change the way without
// changing anything else. Thread-safe, blocking; tensors are borrowed for the call.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cpp/client.h"

namespace kvtide::python {

// Memory of the caller, [tokens][kv_heads][head_dim], that a read fills.
struct ReadTarget {
  void* data = nullptr;
  DataType type = DataType::kF32;
  std::vector<int64_t> shape;
};

class Pool {
 public:
  virtual ~Pool() = default;
  // "embedded", or the address of the daemon.
  virtual const std::string& address() const = 0;

  virtual absl::StatusOr<client::ServerInfo> GetServerInfo() = 0;
  virtual absl::Status RegisterModel(const client::Model& model) = 0;
  virtual absl::StatusOr<client::SequenceId> CreateSequence(const std::string& model,
                                                            const client::SequenceOptions& options) = 0;
  virtual absl::StatusOr<client::SequenceId> ForkSequence(client::SequenceId sequence) = 0;
  virtual absl::Status TruncateSequence(client::SequenceId sequence, int64_t tokens) = 0;
  virtual absl::Status CloseSequence(client::SequenceId sequence) = 0;
  // The length of the sequence after it.
  virtual absl::StatusOr<int64_t> Append(client::SequenceId sequence, int64_t start_position,
                                         std::span<const client::LayerTokens> layers) = 0;
  virtual absl::Status Attend(int layer, std::span<const client::AttendItem> items,
                              const client::AttentionOptions& options) = 0;
  virtual absl::Status AppendAttend(int layer, std::span<const client::AppendAttendItem> items,
                                    const client::AttentionOptions& options) = 0;
  // Rows of tokens first_token, first_token + 1, ... of one layer, decoded where they are coded.
  virtual absl::Status ReadTokens(client::SequenceId sequence, int layer, int64_t first_token,
                                  const ReadTarget& k, const ReadTarget& v) = 0;
  // No ids: all sequences.
  virtual absl::StatusOr<client::MoveResult> EvictSequences(std::span<const client::SequenceId> sequences,
                                                            const client::EvictOptions& options) = 0;
  virtual absl::StatusOr<client::MoveResult> PrefetchSequences(
      std::span<const client::SequenceId> sequences) = 0;
  virtual absl::StatusOr<client::PersistResult> PersistSequences(
      std::span<const client::SequenceId> sequences) = 0;
  virtual absl::StatusOr<std::vector<client::SequenceInfo>> ListSequences(const std::string& model) = 0;
  virtual absl::StatusOr<client::ServerStats> GetStats() = 0;
  virtual absl::StatusOr<client::PlanAnswer> Plan(const client::PlanQuestion& question) = 0;
};

// A kvtided. With `options.session` its sequences die with this object or with this process.
absl::StatusOr<std::unique_ptr<Pool>> ConnectDaemon(const std::string& address,
                                                    const client::ClientOptions& options);

// A cache of this process, set up by a configuration of kvtided (kvtide/v1/kvtided_config.proto) as JSON;
// fields about serving have no effect. Tensors are read and outputs written where the caller has them.
absl::StatusOr<std::unique_ptr<Pool>> MakeEmbeddedPool(const std::string& config_json);

}  // namespace kvtide::python
