// The calls of the block store: what is asked and answered (keyed_store.h does it).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/call/name_space.h"
#include "daemon/cache/call/page_layout.h"
#include "daemon/cache/call/sequence_options.h"

namespace kvtide {

constexpr size_t kMostKeyBytes = 64;

// How blocks travel.
enum class BlockPayload : uint8_t {
  kTensors,  // rows of K and V in a PageLayout, coded and decoded here
  kBytes,    // as they rest, one after the other
};

struct NamespaceInfo {
  NamespaceId id = 0;
  NamespaceSpec spec;
  uint64_t block_bytes = 0;
  int codec_version_k = 0, codec_version_v = 0;
  bool existed = false;
  Persistence persistence = Persistence::kNone;
  Priority priority = Priority::kNormal;
  uint64_t blocks = 0, durable_blocks = 0, leases = 0;
  uint64_t degraded_blocks = 0;  // of `blocks`, of fewer bits than the spec's pair
  // Counters.
  uint64_t hits = 0, misses = 0, stored_blocks = 0, present_blocks = 0, loaded_blocks = 0, dropped_blocks = 0;
};

struct StoreCall {
  NamespaceId name_space = 0;
  std::span<const std::string_view> keys;  // in the order of the tokens: what comes first is dropped last
  BlockPayload form = BlockPayload::kTensors;
  PageLayout layout;                   // of tensors
  std::span<const std::byte> payload;  // the caller's until the call returns
  std::optional<Priority> priority;    // none: the namespace's. Blocks that are there get it if it is higher
  const CallContext* context = nullptr;  // null = this process, for as long as it takes
};
struct StoreReport {
  uint64_t stored = 0;
  uint64_t present = 0;   // there already
  uint64_t left_out = 0;  // without room
  std::string problem;    // why
};

struct LookupCall {
  NamespaceId name_space = 0;
  std::span<const std::string_view> keys;
  absl::Duration lease;  // how long; not above 0: none
  bool peek = false;     // does not count as a use
  const CallContext* context = nullptr;
};
struct LookupReport {
  struct Hits {
    int tier = 0;
    uint64_t blocks = 0;
  };
  uint64_t hits = 0;        // from the first key on
  std::vector<Hits> tiers;  // neighbours in one tier
  // Of the hits, those of fewer bits than the namespace's pair, counted in the keys. It stays so while the
  // lease lasts.
  std::vector<uint64_t> degraded;
  LeaseId lease = 0;  // 0: none
};

// What a caller needs to know before it makes room for a load.
struct LeaseInfo {
  NamespaceSpec spec;
  uint64_t block_bytes = 0;
  uint64_t blocks = 0;
};

struct LoadCall {
  LeaseId lease = 0;
  uint64_t first = 0, blocks = 0;  // of the lease
  BlockPayload form = BlockPayload::kTensors;
  PageLayout layout;
  std::span<std::byte> payload;  // what lies between its rows stays as it is
  bool allow_lost = false;       // blocks that cannot be read are named instead of failing the call
  // Not negative: a tier in memory that the caller reads itself. Nothing is copied, `payload` stays empty,
  // and the form is kBytes.
  int in_place = -1;
  const CallContext* context = nullptr;
};
using PlacesId = uint64_t;
struct LoadReport {
  uint64_t blocks = 0;
  std::vector<uint64_t> lost;  // counted in the lease
  // Those that had fewer bits at rest than the namespace's pair, counted in the lease. As bytes they were
  // coded in the pair once more.
  std::vector<uint64_t> degraded;
  // In place: where each block begins in the tier, -1 where it is lost, has another pair than the namespace,
  // or lies in another tier. The bytes stay as they are until the places are given back (0: none is there).
  std::vector<int64_t> offsets;
  PlacesId places = 0;
};

struct NamespacePersistReport {
  uint64_t blocks = 0, bytes = 0;  // that were written
  uint64_t durable_blocks = 0;
};

}  // namespace kvtide
