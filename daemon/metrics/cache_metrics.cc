#include "daemon/metrics/cache_metrics.h"

#include "daemon/metrics/metric_families.h"

namespace kvtide::metrics {
namespace {

FamilyList::Labels PairLabels(const std::string& tier, const std::string& pair) {
  const size_t slash = pair.find('/');
  return {{"tier", tier}, {"k_type", pair.substr(0, slash)}, {"v_type", pair.substr(slash + 1)}};
}

void AddTiers(const CacheStats& stats, FamilyList* list) {
  list->Gauge("kvtide_pool_capacity_bytes", "Memory of the tier, taken at start.");
  for (const TierStats& tier : stats.tiers) {
    list->Value(tier.capacity_bytes, {{"tier", tier.name}, {"backend", tier.backend}});
  }
  list->Gauge("kvtide_pool_used_bytes", "Bytes of blocks in the tier, by K and V type.");
  for (const TierStats& tier : stats.tiers) {
    for (const auto& [name, pair] : tier.pairs) list->Value(pair.bytes, PairLabels(tier.name, name));
  }
  list->Gauge("kvtide_pool_blocks", "Blocks in the tier, by K and V type.");
  for (const TierStats& tier : stats.tiers) {
    for (const auto& [name, pair] : tier.pairs) list->Value(pair.blocks, PairLabels(tier.name, name));
  }
  list->Gauge("kvtide_pool_reserved_bytes",
              "Bytes taken in the tier: blocks, and what running calls and moves reserved.");
  for (const TierStats& tier : stats.tiers) list->Value(tier.used_bytes, {{"tier", tier.name}});
  list->Gauge("kvtide_pool_largest_free_bytes", "Largest free extent of the tier.");
  for (const TierStats& tier : stats.tiers)
    list->Value(tier.largest_free_extent_bytes, {{"tier", tier.name}});
  list->Gauge("kvtide_pool_pinned_blocks", "Blocks of the tier that running calls hold.");
  for (const TierStats& tier : stats.tiers) list->Value(tier.pinned_blocks, {{"tier", tier.name}});
  list->Counter("kvtide_demoted_blocks_total", "Blocks moved from the tier to a lower one.");
  for (const TierStats& tier : stats.tiers) list->Value(tier.demoted_blocks, {{"tier", tier.name}});
  list->Counter("kvtide_promoted_blocks_total", "Blocks moved into the tier from a lower one.");
  for (const TierStats& tier : stats.tiers) list->Value(tier.promoted_blocks, {{"tier", tier.name}});
  list->Counter("kvtide_dropped_blocks_total", "Blocks dropped from the tier.");
  for (const TierStats& tier : stats.tiers) list->Value(tier.dropped_blocks, {{"tier", tier.name}});
}

void AddContents(const CacheStats& stats, FamilyList* list) {
  list->Gauge("kvtide_sequences", "Open sequences.").Value(stats.sequences);
  list->Gauge("kvtide_sequences_limit", "Most sequences that may be open.").Value(stats.max_sequences);
  list->Gauge("kvtide_models", "Registered models.").Value(stats.models);
  list->Gauge("kvtide_tokens", "Sum of the lengths of all sequences.").Value(stats.tokens);
  list->Gauge("kvtide_shared_blocks", "Blocks held by more than one sequence.").Value(stats.shared_blocks);
  list->Gauge("kvtide_stored_bytes", "Bytes of all blocks, each counted once.").Value(stats.stored_bytes);
  list->Gauge("kvtide_f16_equivalent_bytes",
              "What the tokens of all sequences would take in f16, unpadded and unshared.")
      .Value(stats.f16_equivalent_bytes);
  list->Gauge("kvtide_bits_per_value", "Stored bits per K or V value, scales, padding and tails included.")
      .Value(stats.bits_per_value);
}

void AddCounters(const CacheStats& stats, FamilyList* list) {
  list->Counter("kvtide_sequences_created_total", "Sequences created or forked.")
      .Value(stats.sequences_created);
  list->Counter("kvtide_sequences_closed_total", "Sequences closed.").Value(stats.sequences_closed);
  list->Counter("kvtide_appended_tokens_total", "Tokens appended, counted when the last layer has them.")
      .Value(stats.appended_tokens);
  list->Counter("kvtide_sealed_blocks_total", "Blocks coded into their cache types.")
      .Value(stats.sealed_blocks);
  list->Counter("kvtide_copied_on_write_blocks_total", "Shared tails copied for a writer.")
      .Value(stats.copied_on_write_blocks);
  list->Counter("kvtide_window_freed_blocks_total", "Blocks that fell out of a sliding window.")
      .Value(stats.window_freed_blocks);
  list->Counter("kvtide_evictions_total", "Evict calls.").Value(stats.evict_calls);
  list->Counter("kvtide_prefetches_total", "Prefetch calls.").Value(stats.prefetch_calls);
  list->Counter("kvtide_moves_total", "Blocks moved between tiers.").Value(stats.moves);
  list->Counter("kvtide_failed_moves_total", "Moves given up.").Value(stats.failed_moves);
  list->Counter("kvtide_moved_bytes_total", "Bytes moved between tiers.").Value(stats.moved_bytes);
  list->Counter("kvtide_attended_blocks_total", "Block reads by attention, once for each layer, by place.")
      .Value(stats.attended_blocks - stats.attended_blocks_below_tier0, {{"place", "first_tier"}})
      .Value(stats.attended_blocks_below_tier0, {{"place", "lower_tier"}});
  list->Counter("kvtide_checksum_failures_total", "Blocks whose checksum did not hold.")
      .Value(stats.checksum_failures);
  list->Counter("kvtide_exhausted_total", "Calls that found no room or met a limit.").Value(stats.exhausted);
}

}  // namespace

std::vector<prometheus::MetricFamily> CacheMetrics::Collect() const {
  const CacheStats stats = stats_();
  FamilyList list;
  list.Gauge("kvtide_build_info", "1; the version is in the label.").Value(1.0, {{"version", version_}});
  AddTiers(stats, &list);
  AddContents(stats, &list);
  AddCounters(stats, &list);
  return list.Take();
}

}  // namespace kvtide::metrics
