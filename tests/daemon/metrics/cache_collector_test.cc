#include "daemon/metrics/cache_collector.h"

#include <set>

#include "gtest/gtest.h"
#include "prometheus/text_serializer.h"
#include "tests/daemon/metrics/exposition.h"

namespace kvtide::metrics {
namespace {

Exposition Scrape(const CacheStats& stats) {
  const CacheCollector collector([stats] { return stats; });
  return ParseExposition(prometheus::TextSerializer().Serialize(collector.Collect()));
}

TEST(CacheCollector, LockWaitsAreAHistogram) {
  CacheStats stats;
  stats.lock_waits.counts[0] = 5;
  stats.lock_waits.counts[2] = 3;
  stats.lock_waits.counts.back() = 1;
  stats.lock_waits.seconds = 2.5;
  const Exposition exposition = Scrape(stats);
  const auto bucket = [&](const char* le) {
    return exposition.samples.at("kvtide_lock_wait_seconds_bucket{le=\"" + std::string(le) + "\"}");
  };
  EXPECT_EQ(bucket("1e-06"), 5);
  EXPECT_EQ(bucket("2.5e-05"), 8) << "buckets hold all that is not longer";
  EXPECT_EQ(bucket("1"), 8);
  EXPECT_EQ(bucket("+Inf"), 9);
  EXPECT_EQ(exposition.samples.at("kvtide_lock_wait_seconds_sum"), 2.5);
  EXPECT_EQ(exposition.samples.at("kvtide_lock_wait_seconds_count"), 9);
}

TEST(CacheCollector, FamiliesAndTypes) {
  const std::map<std::string, std::string> expected = {
      {"kvtide_tier_info", "gauge"},
      {"kvtide_pool_capacity_bytes", "gauge"},
      {"kvtide_pool_used_bytes", "gauge"},
      {"kvtide_pool_free_bytes", "gauge"},
      {"kvtide_pool_largest_free_extent_bytes", "gauge"},
      {"kvtide_pool_blocks", "gauge"},
      {"kvtide_pool_pinned_blocks", "gauge"},
      {"kvtide_pair_blocks", "gauge"},
      {"kvtide_pair_bytes", "gauge"},
      {"kvtide_models", "gauge"},
      {"kvtide_sequences", "gauge"},
      {"kvtide_tenant_sequences", "gauge"},
      {"kvtide_tenant_bytes", "gauge"},
      {"kvtide_tokens", "gauge"},
      {"kvtide_shared_blocks", "gauge"},
      {"kvtide_stored_bytes", "gauge"},
      {"kvtide_f16_equivalent_bytes", "gauge"},
      {"kvtide_bytes_per_value", "gauge"},
      {"kvtide_plan_bytes", "gauge"},
      {"kvtide_lock_wait_seconds", "histogram"},
      {"kvtide_sequences_limit", "gauge"},
      {"kvtide_models_limit", "gauge"},
      {"kvtide_sequence_tokens_limit", "gauge"},
      {"kvtide_sequences_created_total", "counter"},
      {"kvtide_sequences_closed_total", "counter"},
      {"kvtide_appended_tokens_total", "counter"},
      {"kvtide_sealed_blocks_total", "counter"},
      {"kvtide_deferred_seals_total", "counter"},
      {"kvtide_failed_seals_total", "counter"},
      {"kvtide_copied_on_write_blocks_total", "counter"},
      {"kvtide_window_freed_blocks_total", "counter"},
      {"kvtide_evict_calls_total", "counter"},
      {"kvtide_prefetch_calls_total", "counter"},
      {"kvtide_moves_total", "counter"},
      {"kvtide_failed_moves_total", "counter"},
      {"kvtide_moved_bytes_total", "counter"},
      {"kvtide_compacted_blocks_total", "counter"},
      {"kvtide_compacted_bytes_total", "counter"},
      {"kvtide_demoted_blocks_total", "counter"},
      {"kvtide_promoted_blocks_total", "counter"},
      {"kvtide_degraded_blocks_total", "counter"},
      {"kvtide_degraded_bytes_total", "counter"},
      {"kvtide_dropped_blocks_total", "counter"},
      {"kvtide_lost_blocks_total", "counter"},
      {"kvtide_tier_writable", "gauge"},
      {"kvtide_tier_encrypted", "gauge"},
      {"kvtide_tier_read_bytes_total", "counter"},
      {"kvtide_tier_written_bytes_total", "counter"},
      {"kvtide_tier_syncs_total", "counter"},
      {"kvtide_tier_errors_total", "counter"},
      {"kvtide_durable_sequences", "gauge"},
      {"kvtide_persisted_total", "counter"},
      {"kvtide_failed_persists_total", "counter"},
      {"kvtide_persisted_bytes_total", "counter"},
      {"kvtide_prefix_blocks", "gauge"},
      {"kvtide_prefix_cached_bytes", "gauge"},
      {"kvtide_durable_prefix_blocks", "gauge"},
      {"kvtide_prefix_lookups_total", "counter"},
      {"kvtide_prefix_hit_tokens_total", "counter"},
      {"kvtide_prefix_miss_tokens_total", "counter"},
      {"kvtide_prefix_reused_tokens_total", "counter"},
      {"kvtide_namespaces", "gauge"},
      {"kvtide_keyed_blocks", "gauge"},
      {"kvtide_keyed_bytes", "gauge"},
      {"kvtide_durable_keyed_blocks", "gauge"},
      {"kvtide_degraded_keyed_blocks", "gauge"},
      {"kvtide_leases", "gauge"},
      {"kvtide_keyed_lookups_total", "counter"},
      {"kvtide_keyed_stores_total", "counter"},
      {"kvtide_keyed_loaded_blocks_total", "counter"},
      {"kvtide_keyed_loaded_bytes_total", "counter"},
      {"kvtide_keyed_in_place_blocks_total", "counter"},
      {"kvtide_keyed_in_place_bytes_total", "counter"},
      {"kvtide_keyed_held_blocks", "gauge"},
      {"kvtide_keyed_held_bytes", "gauge"},
      {"kvtide_leases_granted_total", "counter"},
      {"kvtide_leases_expired_total", "counter"},
      {"kvtide_attended_blocks_total", "counter"},
      {"kvtide_tier_attended_bytes_total", "counter"},
      {"kvtide_lower_tier_attentions_total", "counter"},
      {"kvtide_tier_priority_blocks", "gauge"},
      {"kvtide_tier_rate_bytes_per_second", "gauge"},
      {"kvtide_saved_bytes", "gauge"},
      {"kvtide_pinned_sequences", "gauge"},
      {"kvtide_checksum_failures_total", "counter"},
      {"kvtide_exhausted_calls_total", "counter"},
  };
  EXPECT_EQ(Scrape(BusyStats()).types, expected);
}

// No number occurs twice in BusyStats: a field that is missing, or exported from the wrong place, is found.
TEST(CacheCollector, EveryFieldIsThere) {
  const CacheStats stats = BusyStats();
  const Exposition exposition = Scrape(stats);
  std::multiset<double> values;
  for (const auto& [name, value] : exposition.samples) values.insert(value);
  std::vector<uint64_t> fields = {stats.models,
                                  stats.sequences,
                                  stats.tokens,
                                  stats.shared_blocks,
                                  stats.stored_bytes,
                                  stats.f16_equivalent_bytes,
                                  stats.f16_equivalent_bytes - stats.stored_bytes,
                                  stats.sequences_created,
                                  stats.sequences_closed,
                                  stats.appended_tokens,
                                  stats.sealed_blocks,
                                  stats.deferred_seals,
                                  stats.failed_seals,
                                  stats.copied_on_write_blocks,
                                  stats.window_freed_blocks,
                                  stats.evict_calls,
                                  stats.prefetch_calls,
                                  stats.moves,
                                  stats.failed_moves,
                                  stats.moved_bytes,
                                  stats.compacted_blocks,
                                  stats.compacted_bytes,
                                  stats.attended_blocks_below_tier0,
                                  stats.checksum_failures,
                                  stats.exhausted,
                                  stats.durable_sequences,
                                  stats.pinned_sequences,
                                  stats.persisted,
                                  stats.failed_persists,
                                  stats.persisted_bytes,
                                  stats.prefix_blocks,
                                  stats.prefix_alone_bytes,
                                  stats.durable_prefix_blocks,
                                  stats.prefix_lookups,
                                  stats.prefix_miss_tokens,
                                  stats.prefix_reused_tokens,
                                  stats.namespaces,
                                  stats.keyed_blocks,
                                  stats.keyed_bytes,
                                  stats.durable_keyed_blocks,
                                  stats.degraded_keyed_blocks,
                                  stats.leases,
                                  stats.keyed_hits,
                                  stats.keyed_misses,
                                  stats.keyed_stored,
                                  stats.keyed_present,
                                  stats.keyed_left_out,
                                  stats.keyed_loaded,
                                  stats.keyed_loaded_bytes,
                                  stats.keyed_in_place,
                                  stats.keyed_in_place_bytes,
                                  stats.keyed_held,
                                  stats.keyed_held_bytes,
                                  stats.leases_granted,
                                  stats.leases_expired,
                                  stats.max_sequences,
                                  stats.max_models,
                                  static_cast<uint64_t>(stats.max_tokens_per_sequence)};
  for (const TierStats& tier : stats.tiers) {
    for (const uint64_t field :
         {tier.capacity_bytes, tier.used_bytes, tier.free_bytes, tier.largest_free_extent_bytes, tier.blocks,
          tier.pinned_blocks, tier.demoted_blocks, tier.promoted_blocks, tier.dropped_blocks,
          tier.lost_blocks, tier.attended_bytes, tier.prefix_hit_tokens, tier.degraded_blocks,
          tier.degraded_bytes, tier.low_priority_blocks, tier.high_priority_blocks}) {
      fields.push_back(field);
    }
    if (tier.attends)
      for (const uint64_t field : {tier.attended_in_place, tier.promoted_first}) fields.push_back(field);
    if (!tier.attends)
      for (const uint64_t field :
           {tier.io.read_bytes, tier.io.written_bytes, tier.io.syncs, tier.io.read_errors,
            tier.io.write_errors, tier.io.sync_errors, tier.io.checksum_errors, tier.io.manifest_errors})
        fields.push_back(field);
    for (const auto& [name, pair] : tier.pairs) {
      fields.push_back(pair.blocks);
      fields.push_back(pair.bytes);
    }
  }
  for (const uint64_t field : fields) EXPECT_EQ(values.count(static_cast<double>(field)), 1u) << field;
  EXPECT_EQ(exposition.samples.at("kvtide_bytes_per_value"), 7.125 / 8);
}

TEST(CacheCollector, LabelsAndSums) {
  const CacheStats stats = BusyStats();
  const std::map<std::string, double> samples = Scrape(stats).samples;
  EXPECT_EQ(samples.at("kvtide_tier_info{tier=\"host\",device=\"cpu\",backend=\"cpu\",position=\"1\"}"), 1);
  EXPECT_EQ(samples.at("kvtide_pair_blocks{tier=\"device\",device=\"cuda:0\",pair=\"q8_0/turbo4\"}"), 1023);
  double attended = 0, pairs = 0, used = 0;
  for (const auto& [name, value] : samples) {
    if (name.rfind("kvtide_attended_blocks_total{", 0) == 0) attended += value;
    if (name.rfind("kvtide_pair_bytes{", 0) == 0) pairs += value;
    if (name.rfind("kvtide_pool_used_bytes{", 0) == 0) used += value;
  }
  EXPECT_EQ(attended, static_cast<double>(stats.attended_blocks));
  EXPECT_EQ(pairs, used);
  EXPECT_EQ(used, samples.at("kvtide_stored_bytes"));
}

// Counts are read one after another: parts may be ahead of their sum for a moment, and a gauge below zero is
// nonsense.
TEST(CacheCollector, NeverNegative) {
  CacheStats stats;
  stats.attended_blocks = 3;
  stats.attended_blocks_below_tier0 = 5;
  for (const auto& [name, value] : Scrape(stats).samples) EXPECT_GE(value, 0) << name;
}

// Series have a bound, whatever tenants are called and however many they are; sums stay.
TEST(CacheCollector, TenantsHaveABoundAndNoControlCharacters) {
  CacheStats stats = BusyStats();
  stats.tenants.clear();
  uint64_t sequences = 0, bytes = 0;
  for (uint64_t i = 0; i < 5000; i++) {
    stats.tenants.push_back({"t\n\x1b\"\\" + std::to_string(i), i, 1, {i, 2 * i, 3 * i}});
    sequences += i;
    bytes += 6 * i;
  }
  size_t series = 0;
  double seen_sequences = 0, seen_bytes = 0;
  for (const auto& [name, value] : Scrape(stats).samples) {
    if (name.rfind("kvtide_tenant_", 0) != 0) continue;
    series++;
    EXPECT_EQ(name.find('\x1b'), std::string::npos);
    (name.rfind("kvtide_tenant_bytes{", 0) == 0 ? seen_bytes : seen_sequences) += value;
  }
  EXPECT_EQ(series, 33u * (1 + stats.tiers.size()));
  EXPECT_EQ(seen_sequences, static_cast<double>(sequences));
  EXPECT_EQ(seen_bytes, static_cast<double>(bytes));
}

TEST(CacheCollector, OneSnapshotForAScrape) {
  int calls = 0;
  const CacheCollector collector([&calls] {
    ++calls;
    return BusyStats();
  });
  collector.Collect();
  EXPECT_EQ(calls, 1);
}

TEST(CacheCollector, TheRemoteTierIsToldWhereThereIsOne) {
  CacheStats stats;
  const auto collect = [&] { return CacheCollector([&] { return stats; }).Collect(); };
  const auto find = [](const std::vector<prometheus::MetricFamily>& families, const std::string& name) {
    const auto at = std::find_if(families.begin(), families.end(),
                                 [&](const prometheus::MetricFamily& family) { return family.name == name; });
    return at != families.end() ? std::optional<prometheus::MetricFamily>(*at) : std::nullopt;
  };
  EXPECT_FALSE(find(collect(), "kvtide_remote_up").has_value());
  RemoteStats& remote = stats.remote.emplace();
  remote.hit_blocks = 11;
  remote.miss_blocks = 12;
  remote.timeouts = 13;
  remote.read.Add(absl::Milliseconds(3));
  remote.read.Add(absl::Seconds(100));
  std::vector<prometheus::MetricFamily> families = collect();
  EXPECT_EQ(find(families, "kvtide_remote_up")->metric[0].gauge.value, 1);
  EXPECT_EQ(find(families, "kvtide_remote_lookup_blocks_total")->metric[0].counter.value, 11);
  EXPECT_EQ(find(families, "kvtide_remote_errors_total")->metric[0].counter.value, 13);
  const prometheus::ClientMetric::Histogram times =
      find(families, "kvtide_remote_seconds")->metric[1].histogram;
  EXPECT_EQ(times.sample_count, 2u);
  EXPECT_DOUBLE_EQ(times.sample_sum, 100.003);
  ASSERT_EQ(times.bucket.size(), RemoteTimes::kSeconds.size() + 1);
  EXPECT_EQ(times.bucket[2].cumulative_count, 0u) << "1 ms";
  EXPECT_EQ(times.bucket[3].cumulative_count, 1u) << "5 ms";
  EXPECT_EQ(times.bucket.back().cumulative_count, 2u);
  remote.write_problem = "OOM";
  EXPECT_EQ(find(collect(), "kvtide_remote_writable")->metric[0].gauge.value, 0);
  EXPECT_EQ(find(collect(), "kvtide_remote_up")->metric[0].gauge.value, 1);
  remote.problem = "away";
  EXPECT_EQ(find(collect(), "kvtide_remote_up")->metric[0].gauge.value, 0);
}

}  // namespace
}  // namespace kvtide::metrics
