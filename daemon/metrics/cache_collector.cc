#include "daemon/metrics/cache_collector.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "daemon/metrics/family.h"

namespace kvtide::metrics {
namespace {

// Families of one number.
void WriteGauge(FamilyWriter& writer, const char* name, const char* help, double value) {
  writer.Gauge(name, help).Sample(value);
}
void WriteCounter(FamilyWriter& writer, const char* name, const char* help, uint64_t value) {
  writer.Counter(name, help).Sample(static_cast<double>(value));
}

using Value = uint64_t TierStats::*;

void PerTier(FamilyWriter& writer, const CacheStats& stats, Value value) {
  for (const TierStats& tier : stats.tiers)
    writer.Sample(static_cast<double>(tier.*value), {{"tier", tier.name}, {"device", tier.device}});
}

void PerPair(FamilyWriter& writer, const CacheStats& stats, uint64_t PairStats::*value) {
  for (const TierStats& tier : stats.tiers) {
    for (const auto& [pair, pair_stats] : tier.pairs) {
      writer.Sample(static_cast<double>(pair_stats.*value),
                    {{"tier", tier.name}, {"device", tier.device}, {"pair", pair}});
    }
  }
}

void WritePools(FamilyWriter& writer, const CacheStats& stats) {
  const auto tiers = [&](const char* name, const char* help, Value value) {
    PerTier(writer.Gauge(name, help), stats, value);
  };
  writer.Gauge("kvtide_tier_info",
               "Tiers, their devices and what computes there; position 0 is the fastest tier.");
  int position = 0;
  for (size_t i = 0; i < stats.tiers.size(); ++i) {
    const TierStats& tier = stats.tiers[i];
    if (i > 0 && tier.name != stats.tiers[i - 1].name) position++;
    writer.Sample(1, {{"tier", tier.name},
                      {"device", tier.device},
                      {"backend", tier.backend},
                      {"position", std::to_string(position)}});
  }
  writer.Gauge("kvtide_tier_priority_blocks", "Blocks by the priority of their sequence or namespace.");
  for (const TierStats& tier : stats.tiers) {
    const uint64_t others = tier.low_priority_blocks + tier.high_priority_blocks;
    const uint64_t normal = tier.blocks > others ? tier.blocks - others : 0;
    for (const auto& [priority, blocks] :
         {std::pair{"low", tier.low_priority_blocks}, std::pair{"normal", normal},
          std::pair{"high", tier.high_priority_blocks}})
      writer.Sample(static_cast<double>(blocks),
                    {{"tier", tier.name}, {"device", tier.device}, {"priority", priority}});
  }
  writer.Gauge("kvtide_tier_rate_bytes_per_second",
               "Running averages by which attention chooses whether blocks of a lower tier are brought home "
               "first: what attention reads in the tier, and what comes up from it.");
  for (const TierStats& tier : stats.tiers)
    for (const auto& [work, rate] :
         {std::pair{"attend", tier.attend_rate}, std::pair{"promote", tier.promote_rate}})
      if (rate > 0) writer.Sample(rate, {{"tier", tier.name}, {"device", tier.device}, {"work", work}});
  tiers("kvtide_pool_capacity_bytes", "Memory that the tier took at start.", &TierStats::capacity_bytes);
  tiers("kvtide_pool_used_bytes", "Bytes of blocks, those reserved by running calls and moves included.",
        &TierStats::used_bytes);
  tiers("kvtide_pool_free_bytes", "Bytes that no block holds.", &TierStats::free_bytes);
  tiers("kvtide_pool_largest_free_extent_bytes",
        "The largest block that fits now; far below the free bytes means fragments.",
        &TierStats::largest_free_extent_bytes);
  tiers("kvtide_pool_blocks", "Blocks in the tier.", &TierStats::blocks);
  tiers("kvtide_pool_pinned_blocks", "Blocks that may not move now, because a call or a move uses them.",
        &TierStats::pinned_blocks);
  PerPair(writer.Gauge("kvtide_pair_blocks", "Blocks in the tier by pair of cache types (K/V)."), stats,
          &PairStats::blocks);
  PerPair(writer.Gauge("kvtide_pair_bytes", "Bytes of blocks in the tier by pair of cache types (K/V)."),
          stats, &PairStats::bytes);
}

void WriteContents(FamilyWriter& writer, const CacheStats& stats) {
  WriteGauge(writer, "kvtide_models", "Registered models.", static_cast<double>(stats.models));
  WriteGauge(writer, "kvtide_sequences", "Open sequences.", static_cast<double>(stats.sequences));
  WriteGauge(writer, "kvtide_pinned_sequences",
             "Sequences whose blocks stay where they are, by PinSequences.",
             static_cast<double>(stats.pinned_sequences));
  WriteGauge(writer, "kvtide_tokens", "Sum of the lengths of all sequences; shared tokens count for each.",
             static_cast<double>(stats.tokens));
  WriteGauge(writer, "kvtide_shared_blocks", "Blocks that more than one sequence holds.",
             static_cast<double>(stats.shared_blocks));
  WriteGauge(writer, "kvtide_stored_bytes", "Bytes of all blocks, each counted once.",
             static_cast<double>(stats.stored_bytes));
  WriteGauge(writer, "kvtide_f16_equivalent_bytes",
             "What the tokens of all sequences would take in f16, unpadded and unshared.",
             static_cast<double>(stats.f16_equivalent_bytes));
  WriteGauge(writer, "kvtide_saved_bytes",
             "What f16 would take besides: f16 equivalent less stored bytes; 0 when it is less.",
             stats.f16_equivalent_bytes > stats.stored_bytes
                 ? static_cast<double>(stats.f16_equivalent_bytes - stats.stored_bytes)
                 : 0);
  WriteGauge(
      writer, "kvtide_bytes_per_value",
      "Stored bytes per K or V value of the stored tokens, with scales, padding and tails; times 8 these are "
      "the true bits per value. 0 when nothing is stored.",
      stats.bits_per_value / 8);
  WriteGauge(writer, "kvtide_plan_bytes",
             "Plans of attention that wait for the next layer or step, in devices' memory.",
             static_cast<double>(stats.plan_bytes));
  WriteGauge(writer, "kvtide_sequences_limit", "Most sequences that may be open.",
             static_cast<double>(stats.max_sequences));
  WriteGauge(writer, "kvtide_models_limit", "Most models that may be registered.",
             static_cast<double>(stats.max_models));
  WriteGauge(writer, "kvtide_sequence_tokens_limit", "Most tokens of one sequence.",
             static_cast<double>(stats.max_tokens_per_sequence));
}

void WriteCounters(FamilyWriter& writer, const CacheStats& stats) {
  WriteCounter(writer, "kvtide_sequences_created_total", "Sequences created, forks included.",
               stats.sequences_created);
  WriteCounter(writer, "kvtide_sequences_closed_total", "Sequences closed.", stats.sequences_closed);
  WriteCounter(writer, "kvtide_appended_tokens_total",
               "Tokens appended; counted when the last layer has them.", stats.appended_tokens);
  WriteCounter(writer, "kvtide_sealed_blocks_total", "Blocks compressed from f16 into their pair.",
               stats.sealed_blocks);
  WriteCounter(
      writer, "kvtide_deferred_seals_total",
      "Times that full blocks of a sequence stayed in f16 until its next append, because there was no "
      "room to compress them.",
      stats.deferred_seals);
  WriteCounter(writer, "kvtide_failed_seals_total",
               "Blocks that stayed in f16 until their sequence's next append, because a backend failed.",
               stats.failed_seals);
  WriteCounter(writer, "kvtide_copied_on_write_blocks_total",
               "Shared blocks copied because a sequence wrote into them.", stats.copied_on_write_blocks);
  WriteCounter(writer, "kvtide_window_freed_blocks_total",
               "Blocks freed because they fell out of a sliding window.", stats.window_freed_blocks);
  WriteCounter(writer, "kvtide_evict_calls_total", "Evictions that clients asked for.", stats.evict_calls);
  WriteCounter(writer, "kvtide_prefetch_calls_total", "Prefetches that clients asked for.",
               stats.prefetch_calls);
  WriteCounter(writer, "kvtide_moves_total", "Block moves between tiers.", stats.moves);
  WriteCounter(writer, "kvtide_failed_moves_total", "Block moves that failed; the block stayed where it was.",
               stats.failed_moves);
  WriteCounter(writer, "kvtide_moved_bytes_total", "Bytes of block moves between tiers.", stats.moved_bytes);
  WriteCounter(writer, "kvtide_compacted_blocks_total",
               "Blocks moved inside of their tier, so that a larger one fits.", stats.compacted_blocks);
  WriteCounter(writer, "kvtide_compacted_bytes_total", "Bytes of blocks moved inside of their tier.",
               stats.compacted_bytes);
  const auto tiers = [&](const char* name, const char* help, Value value) {
    PerTier(writer.Counter(name, help), stats, value);
  };
  tiers("kvtide_demoted_blocks_total", "Blocks moved from this tier to a lower one.",
        &TierStats::demoted_blocks);
  tiers("kvtide_promoted_blocks_total", "Blocks moved up into this tier.", &TierStats::promoted_blocks);
  tiers("kvtide_degraded_blocks_total",
        "Blocks recoded in this tier to fewer bits for room, once for each time.",
        &TierStats::degraded_blocks);
  tiers("kvtide_degraded_bytes_total", "Bytes that recoding blocks to fewer bits has freed in this tier.",
        &TierStats::degraded_bytes);
  tiers("kvtide_dropped_blocks_total", "Blocks dropped from this tier for good.", &TierStats::dropped_blocks);
  tiers("kvtide_lost_blocks_total", "Blocks that this tier could not give back: I/O errors, changed bytes.",
        &TierStats::lost_blocks);
  tiers("kvtide_tier_attended_bytes_total",
        "Bytes of blocks that attention read where they lie in this tier, scales and padding included.",
        &TierStats::attended_bytes);
  writer.Counter("kvtide_lower_tier_attentions_total",
                 "Attentions of a sequence, a layer each, over blocks of this lower tier: where they lie, or "
                 "after they were to be brought home first.");
  for (const TierStats& tier : stats.tiers) {
    if (tier.promote_rate <= 0) continue;
    for (const auto& [way, count] :
         {std::pair{"in_place", tier.attended_in_place}, std::pair{"promote_first", tier.promoted_first}})
      writer.Sample(static_cast<double>(count), {{"tier", tier.name}, {"device", tier.device}, {"way", way}});
  }
  // "below" is part of attended_blocks; as labels the two parts add up.
  const uint64_t below = stats.attended_blocks_below_tier0;
  const uint64_t first = stats.attended_blocks > below ? stats.attended_blocks - below : 0;
  writer
      .Counter("kvtide_attended_blocks_total",
               "Blocks read by attention, once for each layer, by where they lay.")
      .Sample(static_cast<double>(first), {{"location", "first_tier"}})
      .Sample(static_cast<double>(below), {{"location", "below_first_tier"}});
  WriteCounter(writer, "kvtide_checksum_failures_total",
               "Blocks whose bytes were not those that were stored.", stats.checksum_failures);
  WriteCounter(writer, "kvtide_exhausted_calls_total",
               "Calls that found no room in any tier, or hit a limit.", stats.exhausted);
}

// Tiers that are reached by I/O, where there are any.
void WriteIo(FamilyWriter& writer, const CacheStats& stats) {
  const auto any = [](const TierStats& tier) { return !tier.attends; };
  if (std::none_of(stats.tiers.begin(), stats.tiers.end(), any)) return;
  const auto each = [&](FamilyWriter& family, auto value) {
    for (const TierStats& tier : stats.tiers)
      if (!tier.attends)
        family.Sample(static_cast<double>(value(tier.io)), {{"tier", tier.name}, {"device", tier.device}});
  };
  each(writer.Gauge("kvtide_tier_writable",
                    "1: the tier takes blocks; 0: its last write failed, as on a full disk."),
       [](const IoTierStats& io) { return io.writable ? 1 : 0; });
  each(writer.Gauge("kvtide_tier_encrypted",
                    "1: what lies in the tier is encrypted (disk_key_file); 0: it is not."),
       [](const IoTierStats& io) { return io.encrypted ? 1 : 0; });
  each(writer.Counter("kvtide_tier_read_bytes_total", "Bytes read from the tier."),
       [](const IoTierStats& io) { return io.read_bytes; });
  each(writer.Counter("kvtide_tier_written_bytes_total", "Bytes written to the tier."),
       [](const IoTierStats& io) { return io.written_bytes; });
  each(writer.Counter("kvtide_tier_syncs_total", "Times that files of the tier were made durable."),
       [](const IoTierStats& io) { return io.syncs; });
  writer.Counter("kvtide_tier_errors_total",
                 "Failed reads, writes and syncs of the tier, reads that found other bytes than were stored, "
                 "and at the start "
                 "manifests of which the newest could not be read.");
  for (const TierStats& tier : stats.tiers) {
    if (tier.attends) continue;
    for (const auto& [operation, count] : {std::pair<const char*, uint64_t>{"read", tier.io.read_errors},
                                           {"write", tier.io.write_errors},
                                           {"sync", tier.io.sync_errors},
                                           {"verify", tier.io.checksum_errors},
                                           {"manifest", tier.io.manifest_errors}})
      writer.Sample(static_cast<double>(count),
                    {{"tier", tier.name}, {"device", tier.device}, {"operation", operation}});
  }
  writer.Gauge("kvtide_durable_sequences", "Sequences that would be there after a restart.")
      .Sample(static_cast<double>(stats.durable_sequences));
  WriteCounter(writer, "kvtide_persisted_total",
               "Times that a sequence became durable, by call or by policy.", stats.persisted);
  WriteCounter(
      writer, "kvtide_failed_persists_total",
      "Times that a sequence, a prefix or a namespace could not become durable, or could not be forgotten.",
      stats.failed_persists);
  WriteCounter(writer, "kvtide_persisted_bytes_total", "Bytes of blocks written to make sequences durable.",
               stats.persisted_bytes);
}

// The tenants that have most, each by its name, and the others together: as many series however many there
// are.
std::vector<TenantStats> ShownTenants(const CacheStats& stats) {
  constexpr size_t kMost = 32;
  std::vector<TenantStats> shown = stats.tenants;
  const auto bytes = [](const TenantStats& tenant) {
    return std::accumulate(tenant.tier_bytes.begin(), tenant.tier_bytes.end(), uint64_t{0});
  };
  std::stable_sort(shown.begin(), shown.end(), [&](const TenantStats& a, const TenantStats& b) {
    return std::pair(bytes(a), a.sequences) > std::pair(bytes(b), b.sequences);
  });
  if (shown.size() <= kMost) return shown;
  TenantStats others{"(others)", 0, 0, std::vector<uint64_t>(stats.tiers.size())};
  for (size_t i = kMost; i < shown.size(); i++) {
    others.sequences += shown[i].sequences;
    others.models += shown[i].models;
    for (size_t t = 0; t < others.tier_bytes.size(); t++) others.tier_bytes[t] += shown[i].tier_bytes[t];
  }
  shown.resize(kMost);
  shown.push_back(std::move(others));
  return shown;
}

void WriteTenants(FamilyWriter& writer, const CacheStats& stats) {
  std::vector<TenantStats> tenants = ShownTenants(stats);
  // An admin may give a tenant any name.
  for (TenantStats& tenant : tenants)
    std::replace_if(
        tenant.tenant.begin(), tenant.tenant.end(),
        [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
  writer.Gauge("kvtide_tenant_sequences", "Open sequences of the tenant.");
  for (const TenantStats& tenant : tenants)
    writer.Sample(static_cast<double>(tenant.sequences), {{"tenant", tenant.tenant}});
  writer.Gauge("kvtide_tenant_bytes",
               "Bytes of blocks in the tier that the tenant has written, copies of them included.");
  for (const TenantStats& tenant : tenants)
    for (size_t t = 0; t < stats.tiers.size() && t < tenant.tier_bytes.size(); t++)
      writer.Sample(
          static_cast<double>(tenant.tier_bytes[t]),
          {{"tenant", tenant.tenant}, {"tier", stats.tiers[t].name}, {"device", stats.tiers[t].device}});
}

// Blocks that are found by token ids.
void WritePrefixes(FamilyWriter& writer, const CacheStats& stats) {
  WriteGauge(writer, "kvtide_prefix_blocks", "Sealed blocks that are found by token ids.",
             stats.prefix_blocks);
  WriteGauge(writer, "kvtide_prefix_cached_bytes", "Bytes of such blocks that no open sequence has.",
             stats.prefix_alone_bytes);
  WriteGauge(writer, "kvtide_durable_prefix_blocks",
             "Blocks of closed sequences that would be found after a restart.", stats.durable_prefix_blocks);
  WriteCounter(writer, "kvtide_prefix_lookups_total", "Lookups of prefixes.", stats.prefix_lookups);
  PerTier(
      writer.Counter("kvtide_prefix_hit_tokens_total",
                     "Tokens that lookups of prefixes found, by the lowest tier that they have blocks in."),
      stats, &TierStats::prefix_hit_tokens);
  WriteCounter(writer, "kvtide_prefix_miss_tokens_total", "Tokens that lookups of prefixes did not find.",
               stats.prefix_miss_tokens);
  WriteCounter(writer, "kvtide_prefix_reused_tokens_total",
               "Tokens that sequences began with instead of computing them.", stats.prefix_reused_tokens);
}

// The block store.
void WriteKeyed(FamilyWriter& writer, const CacheStats& stats) {
  WriteGauge(writer, "kvtide_namespaces", "Open namespaces of the block store.", stats.namespaces);
  WriteGauge(writer, "kvtide_keyed_blocks", "Blocks that are found by key.", stats.keyed_blocks);
  WriteGauge(writer, "kvtide_keyed_bytes", "Bytes of blocks that are found by key.", stats.keyed_bytes);
  WriteGauge(writer, "kvtide_durable_keyed_blocks", "Blocks that would be found by key after a restart.",
             stats.durable_keyed_blocks);
  WriteGauge(writer, "kvtide_degraded_keyed_blocks",
             "Blocks that are found by key and have fewer bits than their namespace's pair.",
             stats.degraded_keyed_blocks);
  WriteGauge(writer, "kvtide_leases", "Leases that are held.", stats.leases);
  writer
      .Counter("kvtide_keyed_lookups_total",
               "Keys that lookups found, or did not: the first miss of a call and all after it.")
      .Sample(static_cast<double>(stats.keyed_hits), {{"result", "hit"}})
      .Sample(static_cast<double>(stats.keyed_misses), {{"result", "miss"}});
  writer
      .Counter("kvtide_keyed_stores_total",
               "Blocks that clients stored: new ones, those that were there, those without room.")
      .Sample(static_cast<double>(stats.keyed_stored), {{"result", "stored"}})
      .Sample(static_cast<double>(stats.keyed_present), {{"result", "present"}})
      .Sample(static_cast<double>(stats.keyed_left_out), {{"result", "left_out"}});
  WriteCounter(writer, "kvtide_keyed_loaded_blocks_total", "Blocks that clients loaded.", stats.keyed_loaded);
  WriteCounter(writer, "kvtide_keyed_loaded_bytes_total",
               "Bytes of blocks that clients loaded, as they rest.", stats.keyed_loaded_bytes);
  WriteCounter(writer, "kvtide_keyed_in_place_blocks_total",
               "Of the blocks that clients loaded, those that they read where they lie (--host-sharing).",
               stats.keyed_in_place);
  WriteCounter(writer, "kvtide_keyed_in_place_bytes_total", "Bytes of these blocks.",
               stats.keyed_in_place_bytes);
  WriteGauge(writer, "kvtide_keyed_held_blocks",
             "Blocks that clients read where they lie now: they stay until these are done.",
             stats.keyed_held);
  WriteGauge(writer, "kvtide_keyed_held_bytes", "Bytes of these blocks.", stats.keyed_held_bytes);
  WriteCounter(writer, "kvtide_leases_granted_total", "Leases that lookups gave.", stats.leases_granted);
  WriteCounter(writer, "kvtide_leases_expired_total",
               "Leases whose time was over before they were given back.", stats.leases_expired);
}

// The tier that daemons share, where there is one.
void WriteRemote(FamilyWriter& writer, const CacheStats& stats) {
  if (!stats.remote.has_value()) return;
  const RemoteStats& remote = *stats.remote;
  WriteGauge(writer, "kvtide_remote_up",
             "1: the remote tier is asked; 0: it did not answer and is tried again later.",
             remote.problem.empty() ? 1 : 0);
  WriteGauge(
      writer, "kvtide_remote_writable",
      "1: the remote tier takes blocks; 0: it is away, or its last write failed, as when its memory is full.",
      remote.problem.empty() && remote.write_problem.empty() ? 1 : 0);
  writer
      .Counter("kvtide_remote_lookup_blocks_total",
               "Blocks that lookups did not find here, by whether the remote tier has them.")
      .Sample(static_cast<double>(remote.hit_blocks), {{"result", "hit"}})
      .Sample(static_cast<double>(remote.miss_blocks), {{"result", "miss"}});
  WriteCounter(writer, "kvtide_remote_read_blocks_total",
               "Blocks and profiles that came from the remote tier.", remote.read_blocks);
  WriteCounter(writer, "kvtide_remote_read_bytes_total", "Bytes of values that came from the remote tier.",
               remote.read_bytes);
  writer
      .Counter("kvtide_remote_write_blocks_total",
               "Blocks that were to be written to the remote tier (with profiles): that were, that lay "
               "there, that were left out.")
      .Sample(static_cast<double>(remote.written_blocks), {{"result", "written"}})
      .Sample(static_cast<double>(remote.present_blocks), {{"result", "present"}})
      .Sample(static_cast<double>(remote.left_out_blocks), {{"result", "left_out"}});
  WriteCounter(writer, "kvtide_remote_written_bytes_total", "Bytes of values that went to the remote tier.",
               remote.written_bytes);
  writer
      .Counter("kvtide_remote_errors_total",
               "What went wrong with the remote tier: silence, connections and answers that were errors, "
               "values that were not what was stored.")
      .Sample(static_cast<double>(remote.timeouts), {{"kind", "timeout"}})
      .Sample(static_cast<double>(remote.errors), {{"kind", "error"}})
      .Sample(static_cast<double>(remote.damaged_blocks), {{"kind", "damaged"}});
  WriteCounter(writer, "kvtide_remote_connects_total", "Connections made to the remote tier.",
               remote.connects);
  WriteGauge(writer, "kvtide_remote_queued_blocks", "Blocks that wait to be written to the remote tier.",
             static_cast<double>(remote.queued_blocks));
  writer.Histogram("kvtide_remote_seconds",
                   "Time of one batch of the remote tier: asking what is there, reading, writing.");
  for (const auto& [operation, times] : {std::pair<const char*, const RemoteTimes*>{"find", &remote.find},
                                         {"read", &remote.read},
                                         {"write", &remote.write}})
    writer.Buckets(RemoteTimes::kSeconds, times->counts, times->seconds, {{"operation", operation}});
}

}  // namespace

std::vector<prometheus::MetricFamily> CacheCollector::Collect() const {
  const CacheStats stats = stats_();
  std::vector<prometheus::MetricFamily> families;
  FamilyWriter writer(&families);
  WritePools(writer, stats);
  WriteContents(writer, stats);
  WriteCounters(writer, stats);
  WriteIo(writer, stats);
  WriteTenants(writer, stats);
  WritePrefixes(writer, stats);
  WriteKeyed(writer, stats);
  writer.Histogram(
      "kvtide_lock_wait_seconds",
      "How long threads waited for the mutex of the cache; those that found it free are left out.",
      LockWaitStats::kBounds, stats.lock_waits.counts, stats.lock_waits.seconds);
  WriteRemote(writer, stats);
  return families;
}

}  // namespace kvtide::metrics
