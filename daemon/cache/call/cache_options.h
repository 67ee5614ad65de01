// Every limit of the cache, checked once at start. Tiers take their memory at start and never grow
// (address space, on hosts: the pages come as they are first used, unless the backend pins them).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "daemon/cache/call/tenants.h"
#include "daemon/cache/call/trace_sink.h"
#include "daemon/cache/call/traffic.h"
#include "daemon/cache/tier/attend_cost.h"
#include "daemon/cache/tier/eviction_policy.h"
#include "daemon/cache/tier/io_tier.h"
#include "daemon/cache/tier/remote_tier.h"
#include "daemon/cache/tier/tier_policy.h"
#include "kernels/backend.h"

namespace kvtide {

// Entries of equal name are one tier that lies on several devices, with a pool and a backend each. Only the
// first tier may: a sequence lives on one of these devices, its home, and in the tiers below, which all
// share.
//
// A tier either has a backend, which attends over its blocks where they lie, or is reached by I/O: then its
// blocks are brought into a tier with a backend before anybody computes on them. Both are borrowed and
// outlive the cache.
struct TierOptions {
  std::string name;            // "device", "host", "disk"
  Backend* backend = nullptr;  // null: a tier of I/O
  size_t capacity_bytes = 0;
  bool checksum = false;  // blocks that come here get an XXH3 checksum, verified when they leave
  std::string device;     // tells the pools of one tier apart: "cuda:1"; empty = the name of what it lies on
  IoTier* io = nullptr;
  DurableIndex* index = nullptr;  // of a tier that survives a restart
  // Bytes a second that attention reads here, and that come up from here, until they are measured; 0 = as
  // backends of this kind begin (tier/measured_rates.h).
  double attend_rate = 0, promote_rate = 0;
  bool attends() const { return backend != nullptr; }
  std::string Medium() const { return backend != nullptr ? backend->name() : io->name(); }
  std::string Device() const { return device.empty() ? Medium() : device; }
};

struct CacheOptions {
  std::vector<TierOptions> tiers;  // fastest first: device (once for each device), host
  // What other daemons share with this one, below all tiers; borrowed, null: nothing. No block lies there:
  // lookups fetch from it for so long, and what others can find is written there.
  RemoteTier* remote = nullptr;
  absl::Duration remote_read = absl::Seconds(1);
  RemoteWrites remote_writes = RemoteWrites::kAll;
  size_t max_unsent_blocks = 4096;             // that wait to be written; beyond it the oldest are left out
  TraceSink* trace = nullptr;                  // hears what is asked of cached blocks; borrowed, null: nobody
  EvictionKind eviction = EvictionKind::kLru;  // of cached blocks that no open sequence has
  TenantQuotas quotas;                         // of tenants; none by default
  TierLimits limits;
  // How attention over blocks in lower tiers that attend goes on: there, or at home after they were brought
  // there. With limits.promote_on_attend off, kCost is kInPlace.
  AttendLowerTiers attend_lower_tiers = AttendLowerTiers::kCost;
  size_t max_models = 64;
  size_t max_sequences = 16384;
  int64_t max_tokens_per_sequence = int64_t{1} << 22;
  int64_t max_tokens_per_append = 1 << 16;
  int64_t max_queries_per_item = 1 << 16;
  size_t max_batch_items = 1024;
  // Most products of queries, visible tokens and query heads of one attention, summed over its items: 32,768
  // queries of 64 heads over 131,072 tokens.
  int64_t max_attend_work = int64_t{1} << 38;
  size_t max_namespaces = 256;                // of the block store
  size_t max_keyed_blocks = size_t{1} << 20;  // that are found by key; beyond it the coldest are dropped
  // Of prefixes: blocks that are found by the token ids up to their end; beyond it the coldest that no
  // sequence has are dropped. 0: none, token ids are not looked at.
  size_t max_prefix_blocks = size_t{1} << 20;
  size_t max_leases = 16384;
  size_t max_cached_plans = 64;               // of attentions, kept for the next layer and step,
  size_t max_plan_bytes = size_t{64} << 20;   // and what they take of devices' memory beside the tiers
  size_t move_piece_bytes = size_t{1} << 20;  // copies between tiers are cut into pieces of at most this
  size_t max_moves_in_flight = 16;            // blocks, per round of the mover
  size_t max_copy_threads = 8;  // of one call of the block store, its own included; at most one per processor
  bool background_moves = true;  // false: only RunMovesOnce moves by policy (tests, simulation)
  absl::Duration move_interval = absl::Milliseconds(20);
  absl::Duration room_wait = absl::Milliseconds(
      200);  // how long a call waits for pins and moves of others: for room, or for a block that it writes to
  // How long a call waits for blocks that other calls bring in from a tier of I/O.
  absl::Duration io_wait = absl::Seconds(30);
  absl::Duration persist_interval = absl::Seconds(1);  // of sequences that are always to be durable
  TrafficWatcher* traffic = nullptr;  // shown what sequences append and attend; borrowed, null: nobody
  std::function<absl::Time()> clock = absl::Now;
  uint64_t id_seed = 0;  // of the sequence ids; 0 = random
};

// What may change while the cache runs.
struct LiveLimits {
  double high_watermark = TierLimits().high_watermark, low_watermark = TierLimits().low_watermark;
  size_t max_sequences = CacheOptions().max_sequences, max_models = CacheOptions().max_models;
  TenantQuotas quotas;
};
LiveLimits LiveLimitsOf(const CacheOptions& options);

// Devices of the first tier: so many entries from the first one on have its name.
int CountHomes(const std::vector<TierOptions>& tiers);

absl::Status CheckCacheOptions(const CacheOptions& options);

}  // namespace kvtide
