#include "tests/daemon/metrics/exposition.h"

#include <cstdlib>
#include <sstream>

namespace kvtide::metrics {
namespace {

TierStats Tier(const std::string& name, const std::string& backend, uint64_t base) {
  TierStats tier;
  tier.name = name;
  tier.backend = tier.device = backend;
  tier.pairs["f16/f16"] = {base + 11, (base + 11) * 4096};
  tier.pairs["q8_0/turbo4"] = {base + 23, (base + 23) * 1632};
  tier.pairs["turbo3/turbo3"] = {base + 37, (base + 37) * 800};
  for (const auto& [pair, stats] : tier.pairs) {
    tier.blocks += stats.blocks;
    tier.used_bytes += stats.bytes;
  }
  tier.capacity_bytes = base * 100000 + 7;
  tier.free_bytes = tier.capacity_bytes - tier.used_bytes;
  tier.largest_free_extent_bytes = tier.free_bytes / 2 + 1;
  tier.pinned_blocks = base + 3;
  tier.demoted_blocks = base + 5;
  tier.promoted_blocks = base + 7;
  tier.dropped_blocks = base + 9;
  tier.lost_blocks = base + 13;
  tier.attended_bytes = base + 41;
  tier.attended_in_place = base + 44;
  tier.promoted_first = base + 46;
  tier.attend_rate = static_cast<double>(base) * 1e6;
  tier.promote_rate = static_cast<double>(base) * 1e5;
  tier.low_priority_blocks = base + 48;
  tier.high_priority_blocks = base + 50;
  tier.prefix_hit_tokens = base + 43;
  tier.degraded_blocks = base + 59;
  tier.degraded_bytes = base + 67;
  return tier;
}

TierStats DiskTier(uint64_t base) {
  TierStats tier = Tier("disk", "disk", base);
  tier.attends = false;
  tier.attended_in_place = tier.promoted_first = 0;
  tier.attend_rate = tier.promote_rate = 0;
  tier.io.read_bytes = base + 17;
  tier.io.written_bytes = base + 19;
  tier.io.syncs = base + 21;
  tier.io.read_errors = base + 25;
  tier.io.write_errors = base + 27;
  tier.io.sync_errors = base + 29;
  tier.io.manifest_errors = base + 53;
  tier.io.checksum_errors = base + 31;
  tier.io.writable = false;
  tier.io.encrypted = true;
  return tier;
}

}  // namespace

CacheStats BusyStats() {
  CacheStats stats;
  stats.tiers = {Tier("device", "cuda:0", 1000), Tier("host", "cpu", 2000), DiskTier(3000)};
  for (const TierStats& tier : stats.tiers) {
    stats.stored_bytes += tier.used_bytes;
    stats.dropped_blocks += tier.dropped_blocks;
    stats.moves += tier.demoted_blocks + tier.promoted_blocks;
  }
  stats.tenants = {{"acme", 8102, 8101, {8111, 8112, 8113}}, {"default", 8202, 8201, {8211, 8212, 8213}}};
  stats.models = 3;
  stats.sequences = 5;
  stats.tokens = 70001;
  stats.shared_blocks = 71;
  stats.f16_equivalent_bytes = stats.stored_bytes * 2 + 1;
  stats.bits_per_value = 7.125;
  stats.sequences_created = 101;
  stats.sequences_closed = 96;
  stats.appended_tokens = 90001;
  stats.sealed_blocks = 4001;
  stats.deferred_seals = 4003;
  stats.failed_seals = 4007;
  stats.copied_on_write_blocks = 43;
  stats.window_freed_blocks = 47;
  stats.evict_calls = 53;
  stats.prefetch_calls = 59;
  stats.failed_moves = 61;
  stats.moved_bytes = 123456789;
  stats.compacted_blocks = 97;
  stats.compacted_bytes = 83001;
  stats.attended_blocks = 5000001;
  stats.attended_blocks_below_tier0 = 1000002;
  stats.checksum_failures = 67;
  stats.exhausted = 73;
  stats.durable_sequences = 79;
  stats.pinned_sequences = 83007;
  stats.persisted = 83;
  stats.failed_persists = 89;
  stats.prefix_blocks = 70016;
  stats.prefix_alone_bytes = 70017;
  stats.durable_prefix_blocks = 70018;
  stats.prefix_lookups = 70019;
  stats.prefix_miss_tokens = 70020;
  stats.prefix_reused_tokens = 70021;
  stats.namespaces = 70002;
  stats.keyed_blocks = 70003;
  stats.keyed_bytes = 70004;
  stats.durable_keyed_blocks = 70005;
  stats.degraded_keyed_blocks = 70022;
  stats.leases = 70006;
  stats.keyed_hits = 70007;
  stats.keyed_misses = 70008;
  stats.keyed_stored = 70009;
  stats.keyed_present = 70010;
  stats.keyed_left_out = 70011;
  stats.keyed_loaded = 70012;
  stats.keyed_loaded_bytes = 70013;
  stats.keyed_in_place = 70116;
  stats.keyed_in_place_bytes = 70117;
  stats.keyed_held = 70118;
  stats.keyed_held_bytes = 70119;
  stats.leases_granted = 70014;
  stats.leases_expired = 70015;
  stats.persisted_bytes = 987654321;
  stats.max_sequences = 16384;
  stats.max_models = 64;
  stats.max_tokens_per_sequence = 4194304;
  return stats;
}

std::unique_ptr<Metrics> BusyMetrics() {
  MetricsOptions options;
  options.version = "1.2.3";
  options.stats = [] {
    CacheStats stats = BusyStats();
    RemoteStats& remote = stats.remote.emplace();
    remote.hit_blocks = 11;
    remote.written_blocks = 12;
    for (RemoteTimes* times : {&remote.find, &remote.read, &remote.write}) times->Add(absl::Milliseconds(3));
    return stats;
  };
  options.service = [] {
    ServiceStats stats;
    stats.calls_under_way = 4;
    stats.queued_calls = 2;
    stats.queued_bulk_calls = 1;
    stats.connections = 7;
    stats.connections_limit = 1024;
    stats.connections_accepted = 20;
    stats.connections_refused = {{"limit", 3}, {"silent", 0}, {"descriptors", 0}, {"plaintext", 0}};
    stats.ways = {{"grpc", 2, 301, 41, 5001, 6001}, {"shared_memory", 1, 302, 42, 5002, 6002}};
    stats.memory = {{"sequences", 1 << 20, 1 << 20}, {"host", 1 << 24, 1 << 23}};
    stats.call_memory_bytes = 4096;
    stats.call_memory_limit = 1 << 20;
    stats.memory_overhead_limit = 1 << 21;
    stats.shared_memory_clients = 2;
    stats.shared_memory_refused = 1;
    stats.shared_memory_bytes = 1 << 20;
    stats.shared_memory_limit = 1 << 22;
    stats.certificate_expires = 1800000000;
    for (const char* what :
         {"config", "tokens", "certificate", "socket", "device", "disk", "remote", "persist"})
      stats.troubles.emplace_back(what, false);
    return stats;
  };
  options.works = {"append", "seal", "attend", "read", "copy"};
  auto metrics = std::make_unique<Metrics>(std::move(options));
  metrics->RecordLookup("acme", "blocks", "host", 30);
  metrics->RecordLookup("acme", "blocks", "", 10);
  metrics->RecordLookup("acme", "tokens", "device", 640);
  metrics->RecordWork(2, absl::Microseconds(300));
  metrics->RecordWork(4, absl::Milliseconds(30));
  metrics->RecordWork(99, absl::Milliseconds(30));  // of none that it knows
  constexpr int kOk = 0, kResourceExhausted = 8;
  for (int i = 0; i < 10; ++i)
    metrics->RecordCall({.method = "AppendAttend",
                         .code = kOk,
                         .duration = absl::Microseconds(300 + i),
                         .request_bytes = 100,
                         .response_bytes = 200});
  metrics->RecordCall({.method = "AppendAttend",
                       .code = kResourceExhausted,
                       .duration = absl::Seconds(2),
                       .request_bytes = 100,
                       .response_bytes = 0});
  metrics->RecordCall({.method = "Session",
                       .code = kOk,
                       .duration = absl::Hours(3),
                       .request_bytes = 0,
                       .response_bytes = 0});
  return metrics;
}

Exposition ParseExposition(const std::string& text) {
  Exposition exposition;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("# TYPE ", 0) == 0) {
      std::istringstream words(line.substr(7));
      std::string name, type;
      words >> name >> type;
      exposition.types[name] = type;
    } else if (!line.empty() && line[0] != '#') {
      const size_t space = line.rfind(' ');
      exposition.samples[line.substr(0, space)] = std::strtod(line.c_str() + space + 1, nullptr);
    }
  }
  return exposition;
}

}  // namespace kvtide::metrics
