// The block store of a daemon or pool: blocks without a sequence, found by key, for engines that keep pages
// of their own. kvtide/v1/blocks.proto explains the verbs, their units, limits and errors. Calls may come
// from any number of threads; payloads are borrowed for the call, and are read and written in place where
// both ends see the memory (an embedded pool, Pool::Allocate).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/cpp/client.h"
#include "clients/cpp/host_tier.h"

namespace kvtide::client {

struct TensorBlocks {
  int layers = 0, kv_heads = 0, head_dim_k = 0, head_dim_v = 0;
  std::string pair;  // at rest; empty = f16/f16
};
struct OpaqueBlocks {
  int64_t block_bytes = 0;
  std::string encoding;
};
struct NamespaceSpec {
  std::string model;  // fingerprint of what computes the blocks
  int block_tokens = 0;
  std::variant<TensorBlocks, OpaqueBlocks> content;
  std::string salt;
  // Pairs of fewer and fewer bits that blocks of tensors may be recoded as when their tier needs room, before
  // they are dropped. Such blocks are named by lookups and loads. Another list is another namespace.
  std::vector<std::string> degrade;
  bool persist_all = false;                // blocks become durable soon after they were stored
  Priority priority = Priority::kDefault;  // of blocks that are stored without one; default = normal
};

enum class BlockForm : uint8_t { kDefault, kTensors, kBytes };
// In elements of `type`; 0 = dense [blocks][layers][K page, V page].
struct PageLayout {
  DataType type = DataType::kF16;
  bool heads_first = false;  // HND: [heads][tokens][dim]
  int64_t block_stride = 0, layer_stride = 0, value_offset = 0;
  int64_t token_stride_k = 0, token_stride_v = 0, head_stride_k = 0, head_stride_v = 0;
};

struct StoreBlocksResult {
  int64_t stored = 0, present = 0, left_out = 0;
  std::string problem;  // why some were left out
};
struct LookupBlocksResult {
  int64_t hits = 0;                                    // from the first key on
  std::vector<std::pair<std::string, int64_t>> tiers;  // neighbours in one tier
  LeaseId lease = 0;                                   // 0 = none
  double lease_seconds = 0;
  std::vector<int64_t> degraded;  // of the hits, those of fewer bits than the pair, counted in the keys
};
struct PersistNamespaceResult {
  int64_t blocks = 0, bytes = 0, durable_blocks = 0;
};

// Blocks that are read where they lie.
struct BlocksInPlace {
  HostTier tier;                         // where they lie
  std::vector<const std::byte*> blocks;  // block_bytes each; null: lost, degraded, or in another tier (Load)
  std::vector<int64_t> lost;             // counted in the lease
  std::vector<int64_t> degraded;         // likewise: of fewer bits than the pair, and so not in place
  uint64_t places = 0;                   // to be given back; 0 = none
};

// An open namespace. It borrows its client.
class BlockStore {
 public:
  static absl::StatusOr<std::unique_ptr<BlockStore>> Open(Client& client, const NamespaceSpec& spec);

  uint64_t namespace_id() const { return id_; }
  int64_t block_bytes() const { return block_bytes_; }
  const std::string& pair() const { return pair_; }  // empty = opaque
  int codec_version_k() const { return codec_version_k_; }
  int codec_version_v() const { return codec_version_v_; }
  bool existed() const { return existed_; }

  absl::StatusOr<StoreBlocksResult> Store(std::span<const std::string_view> keys,
                                          std::span<const std::byte> payload,
                                          BlockForm form = BlockForm::kDefault, const PageLayout& layout = {},
                                          Priority priority = Priority::kDefault);
  // `lease_seconds`: 0 = 30; negative: no lease. `peek`: does not count as a use, and gives no lease.
  absl::StatusOr<LookupBlocksResult> Lookup(std::span<const std::string_view> keys, double lease_seconds = 0,
                                            bool peek = false);
  // Blocks [first, first + count) of the lease into `payload`. With `lost` the blocks that cannot be read are
  // put there instead of failing the call. Over gRPC strided payloads need room for what lies between the
  // rows, too, which is written as 0. `degraded`: null, or gets those that had fewer bits at rest than the
  // pair.
  absl::Status Load(LeaseId lease, int64_t first, int64_t count, std::span<std::byte> payload,
                    BlockForm form = BlockForm::kDefault, const PageLayout& layout = {},
                    std::vector<int64_t>* lost = nullptr, std::vector<int64_t>* degraded = nullptr);
  // That of the pool. Empty: LoadInPlace is FailedPrecondition.
  HostTier host_tier() const;
  // The same blocks without a copy. Their bytes stay until the places are given back (here, with a later
  // load's `done`) or the connection ends, whatever becomes of the lease; whoever still copies from them
  // waits for that first.
  absl::StatusOr<BlocksInPlace> LoadInPlace(LeaseId lease, int64_t first, int64_t count,
                                            std::span<const uint64_t> done = {});
  absl::Status GiveBack(std::span<const uint64_t> places);
  absl::StatusOr<bool> Release(LeaseId lease);
  absl::StatusOr<PersistNamespaceResult> Persist();
  // The namespace is gone; returns how many blocks it had.
  absl::StatusOr<int64_t> Delete();

 private:
  explicit BlockStore(Client& client) : client_(client) {}

  Client& client_;
  uint64_t id_ = 0;
  int64_t block_bytes_ = 0;
  std::string pair_;
  int codec_version_k_ = 0, codec_version_v_ = 0;
  bool existed_ = false;
};

}  // namespace kvtide::client
