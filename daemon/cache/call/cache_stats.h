// A snapshot of the cache for metrics, status displays and tests. Counters only grow; gauges are never
// negative.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/call/sequence_options.h"
#include "daemon/cache/tier/io_tier.h"
#include "daemon/cache/tier/remote_tier.h"
#include "kernels/base/lock_waits.h"

namespace kvtide {

using SequenceId = uint64_t;  // random, never 0: an id of an earlier process is not valid here
using ModelId = uint32_t;     // 1, 2, ... in order of registration

struct PairStats {
  uint64_t blocks = 0;
  uint64_t bytes = 0;
};

struct TierStats {
  std::string name;
  std::string backend;
  std::string device;  // tells the pools of a tier apart that lies on several devices
  uint64_t capacity_bytes = 0;
  uint64_t used_bytes = 0;  // blocks, those reserved by running calls and moves included
  uint64_t free_bytes = 0;
  uint64_t largest_free_extent_bytes = 0;
  uint64_t blocks = 0;
  uint64_t pinned_blocks = 0;
  std::map<std::string, PairStats> pairs;  // by pair name
  uint64_t demoted_blocks = 0;             // counters: moves out of this tier downwards,
  uint64_t promoted_blocks = 0;            // moves into this tier from below,
  uint64_t dropped_blocks = 0;             // drops from this tier,
  uint64_t degraded_blocks = 0;            // recoded here to fewer bits for room,
  uint64_t degraded_bytes = 0;             // and what that has freed,
  uint64_t lost_blocks = 0;                // blocks that it could not give back
  uint64_t attended_bytes = 0;             // of blocks that attention read here, a layer each
  // Attentions of a sequence, a layer each, over blocks of this lower tier: where they lie, and after they
  // were to be brought home first.
  uint64_t attended_in_place = 0, promoted_first = 0;
  double attend_rate = 0, promote_rate = 0;  // bytes a second, as that is decided by (tier/measured_rates.h)
  uint64_t low_priority_blocks = 0, high_priority_blocks = 0;  // of `blocks`
  uint64_t prefix_hit_tokens = 0;                              // tokens that lookups of prefixes found here
  bool attends = true;  // in place; false: reached by I/O, of which `io` tells
  IoTierStats io;
};

struct TenantStats {
  std::string tenant;
  uint64_t sequences = 0, models = 0;
  std::vector<uint64_t> tier_bytes;  // by tier: of blocks that it has written, copies included
};

struct CacheStats {
  std::vector<TenantStats> tenants;  // that have anything, by name
  std::vector<TierStats> tiers;      // in the order of the options: each device of the first tier is an entry
  uint64_t models = 0;
  uint64_t sequences = 0;
  uint64_t tokens = 0;         // sum of the sequences' lengths
  uint64_t shared_blocks = 0;  // held by more than one sequence
  uint64_t stored_bytes = 0;   // of all blocks, each counted once
  uint64_t table_bytes = 0;    // of block tables and what readers were shown of them, in ordinary memory
  uint64_t plan_bytes = 0;     // of plans of attention, in devices' memory beside the tiers
  uint64_t f16_equivalent_bytes =
      0;                      // what the stored tokens of all sequences would take in f16, unpadded, unshared
  double bits_per_value = 0;  // stored bits per value of the stored tokens, each block once; 0 when empty
  // Counters.
  uint64_t sequences_created = 0;
  uint64_t sequences_closed = 0;
  uint64_t appended_tokens = 0;  // counted when the last layer has them
  uint64_t sealed_blocks = 0;
  uint64_t failed_seals = 0;  // backend errors; the blocks stay exact and are tried again
  // Times that blocks of a sequence and layer group stayed exact until its next append, because there was no
  // room to code them or to bring them to where that is done.
  uint64_t deferred_seals = 0;
  uint64_t copied_on_write_blocks = 0;
  uint64_t window_freed_blocks = 0;  // fell out of a sliding window
  uint64_t evict_calls = 0;
  uint64_t prefetch_calls = 0;
  uint64_t moves = 0;
  uint64_t failed_moves = 0;
  uint64_t moved_bytes = 0;       // between tiers
  uint64_t compacted_blocks = 0;  // moved inside of their tier, so that a larger block fits
  uint64_t compacted_bytes = 0;
  uint64_t dropped_blocks = 0;
  uint64_t attended_blocks = 0;  // block reads by attention, one layer each
  uint64_t attended_blocks_below_tier0 = 0;
  uint64_t checksum_failures = 0;
  uint64_t exhausted = 0;        // calls that ended with ResourceExhausted
  uint64_t lost_blocks = 0;      // that a tier could not give back, or whose bytes had changed
  uint64_t persist_calls = 0;    // that clients asked for
  uint64_t persisted = 0;        // manifests that became durable,
  uint64_t failed_persists = 0;  // and that did not, or could not be erased,
  std::string persist_problem;   // why the last of these; empty = none
  uint64_t persisted_bytes = 0;  // of blocks that were written for it
  uint64_t pinned_sequences = 0;
  uint64_t durable_sequences = 0;
  // Prefixes: blocks that are found by token ids, and of these the bytes that no sequence has.
  uint64_t prefix_blocks = 0, prefix_alone_bytes = 0, durable_prefix_blocks = 0;
  // Counters: lookups, tokens that they did not find (those found: TierStats), tokens that sequences began
  // with.
  uint64_t prefix_lookups = 0, prefix_miss_tokens = 0, prefix_reused_tokens = 0;
  // The block store: blocks that are found by key.
  uint64_t namespaces = 0, keyed_blocks = 0, keyed_bytes = 0, durable_keyed_blocks = 0, leases = 0;
  uint64_t degraded_keyed_blocks = 0;  // of fewer bits than their namespaces' pairs
  // Counters.
  uint64_t keyed_hits = 0;    // keys that lookups found,
  uint64_t keyed_misses = 0;  // and that they did not: the first miss of a call and all after it
  uint64_t keyed_stored = 0;
  uint64_t keyed_present = 0;   // stores of keys that were there
  uint64_t keyed_left_out = 0;  // stores without room
  uint64_t keyed_loaded = 0, keyed_loaded_bytes = 0;
  uint64_t keyed_in_place = 0, keyed_in_place_bytes = 0;  // of these, those that clients read where they lie
  uint64_t keyed_held = 0, keyed_held_bytes = 0;          // blocks that they read so now: a gauge
  uint64_t leases_granted = 0, leases_expired = 0;
  LockWaitStats lock_waits;           // of calls, for the cache's mutex
  std::optional<RemoteStats> remote;  // none: there is no remote tier
  // Limits, for display beside the gauges.
  uint64_t max_sequences = 0;
  uint64_t max_models = 0;
  int64_t max_tokens_per_sequence = 0;
};

// Blocks [first, end) of a layer group that the last append would have coded, and found no room to.
struct DeferredBlocks {
  int group = 0;
  int64_t first = 0, end = 0;
};

// Blocks [first, end) of a layer group that were recoded to fewer bits than their sequence asked for.
struct DegradedBlocks {
  int group = 0;
  int64_t first = 0, end = 0;
  CachePair pair;  // what they are stored as
};

struct SequenceInfo {
  SequenceId id = 0;
  ModelId model = 0;
  std::string model_name;
  SequenceOptions options;
  SequenceId forked_from = 0;  // 0 = not a fork
  int64_t tokens = 0;          // the sequence's length: the minimum over its layers
  int64_t max_layer_tokens = 0;
  absl::Time created, last_used;
  std::string device;          // of the first tier, where the sequence lives
  bool durable = false;        // it would be there after a restart,
  int64_t durable_tokens = 0;  // with so many tokens
  int64_t known_tokens = 0;    // from the first one on, whose ids were said
  int64_t reused_tokens = 0;   // that it began with, from a cached prefix
  absl::Time pinned_until = absl::InfinitePast();
  std::vector<uint64_t> blocks_by_tier;
  std::vector<uint64_t> bytes_by_tier;  // shared blocks count in every sequence that holds them
  uint64_t shared_blocks = 0;
  uint64_t dropped_blocks = 0;
  uint64_t degraded_blocks = 0;          // with bytes, of fewer bits than the pair says,
  std::vector<DegradedBlocks> degraded;  // and which; not in lists of sequences
  std::vector<DeferredBlocks> deferred;  // exact until the next append
};

// Blocks and bytes of a sequence at rest, from the same functions as the allocation (kernels/format).
struct PredictedBytes {
  uint64_t exact_blocks = 0;
  uint64_t coded_blocks = 0;
  uint64_t bytes = 0;
};

// What the blocks of all open sequences should take at rest, and what they take; shared ones count for each.
struct SequenceMemory {
  uint64_t predicted_bytes = 0, held_bytes = 0;
};

}  // namespace kvtide
