#include "clients/cli/ops/status_report.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "clients/cli/terminal/json_text.h"
#include "clients/cli/terminal/table.h"
#include "nlohmann/json.hpp"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using client::SequenceInfo;
using client::ServerStats;
using client::TierStats;
using planner::FormatBytes;
using Json = nlohmann::ordered_json;

constexpr double kNearlyFull = 0.90, kFull = 0.97;

double UsedShare(const TierStats& tier) {
  if (tier.capacity_bytes <= 0) return 0;
  return static_cast<double>(tier.used_bytes) / static_cast<double>(tier.capacity_bytes);
}

std::string PairsText(const TierStats& tier) {
  std::vector<std::string> parts;
  for (const client::PairStats& pair : tier.pairs)
    parts.push_back(absl::StrCat(pair.pair, " ", FormatBytes(pair.bytes)));
  return absl::StrJoin(parts, ", ");
}

std::string Tiers(const ServerStats& stats, const Terminal& terminal) {
  Table table({{"tier", Align::kLeft},
               {"on", Align::kLeft},
               {"used"},
               {"capacity"},
               {"full"},
               {"largest free"},
               {"blocks"},
               {"pinned"},
               {"bytes by pair (K/V)", Align::kLeft}});
  for (const TierStats& tier : stats.tiers) {
    const double share = UsedShare(tier);
    table.AddRow(
        {tier.name, tier.device.empty() ? tier.backend : tier.device, FormatBytes(tier.used_bytes),
         FormatBytes(tier.capacity_bytes), PercentText(share, 1), FormatBytes(tier.largest_free_bytes),
         absl::StrCat(tier.blocks), absl::StrCat(tier.pinned_blocks), PairsText(tier)},
        share < kNearlyFull ? Paint::kPlain : ShareColour(share, kNearlyFull, kFull));
  }
  std::string text = table.Render(terminal);
  for (const TierStats& tier : stats.tiers) {
    if (!tier.io) continue;
    absl::StrAppend(&text, Printable(tier.name), ": ", Printable(tier.backend),
                    tier.encrypted ? ", encrypted" : ", not encrypted", ", read ",
                    FormatBytes(tier.read_bytes), ", written ", FormatBytes(tier.written_bytes),
                    "; failed reads ", tier.read_errors, ", writes ", tier.write_errors, ", syncs ",
                    tier.sync_errors, ", other bytes than stored ", tier.checksum_errors, "; lost ",
                    tier.lost_blocks, " blocks\n");
    if (!tier.problem.empty())
      absl::StrAppend(&text,
                      terminal.Painted(absl::StrCat(Printable(tier.name),
                                                    " takes no blocks now: ", Printable(tier.problem)),
                                       Paint::kRed),
                      "\n");
  }
  return text;
}

// The tier that daemons share; empty without one.
std::string Remote(const ServerStats& stats, const Terminal& terminal) {
  if (!stats.remote.has_value()) return "";
  const client::RemoteStats& remote = *stats.remote;
  const double asked = static_cast<double>(remote.hit_blocks + remote.miss_blocks);
  std::string text =
      absl::StrCat("remote: ", Printable(remote.server), ", found ",
                   PercentText(static_cast<double>(remote.hit_blocks), asked), " of ",
                   remote.hit_blocks + remote.miss_blocks, " blocks that were not here; read ",
                   FormatBytes(remote.read_bytes), ", written ", FormatBytes(remote.written_bytes), " (",
                   remote.present_blocks, " blocks were there, ", remote.left_out_blocks, " left out, ",
                   remote.queued_blocks, " wait); damaged ", remote.damaged_blocks, ", time-outs ",
                   remote.timeouts, ", errors ", remote.errors, "\n");
  const auto say = [&](const char* what, const std::string& problem) {
    if (problem.empty()) return;
    absl::StrAppend(
        &text, terminal.Painted(absl::StrCat("remote ", what, ": ", Printable(problem)), Paint::kRed), "\n");
  };
  say("is away", remote.problem);
  say("takes no blocks now", remote.write_problem);
  return text;
}

Json RemoteJson(const ServerStats& stats) {
  if (!stats.remote.has_value()) return {};
  const client::RemoteStats& remote = *stats.remote;
  return {{"server", remote.server},
          {"problem", remote.problem},
          {"write_problem", remote.write_problem},
          {"hit_blocks", remote.hit_blocks},
          {"miss_blocks", remote.miss_blocks},
          {"read_blocks", remote.read_blocks},
          {"read_bytes", remote.read_bytes},
          {"written_blocks", remote.written_blocks},
          {"written_bytes", remote.written_bytes},
          {"present_blocks", remote.present_blocks},
          {"left_out_blocks", remote.left_out_blocks},
          {"damaged_blocks", remote.damaged_blocks},
          {"timeouts", remote.timeouts},
          {"errors", remote.errors},
          {"connects", remote.connects},
          {"queued_blocks", remote.queued_blocks},
          {"memory_limit_bytes", remote.memory_limit_bytes},
          {"memory_used_bytes", remote.memory_used_bytes},
          {"memory_policy", remote.memory_policy}};
}

// Calibrations that are under way, and profiles that new sequences of calibrated K types have.
std::string Profiles(const client::CalibrationReport& report) {
  std::string text;
  const auto begin = [&](const std::string& model, const std::string& tenant) {
    absl::StrAppend(&text, "keys       ", Printable(model), tenant == "default" ? "" : " of tenant ",
                    tenant == "default" ? "" : Printable(tenant), ": ");
  };
  for (const client::Calibration& one : report.calibrations) {
    begin(one.model, one.tenant);
    absl::StrAppend(&text, client::NameOf(one.state));
    if (one.state == client::CalibrationState::kGathering)
      absl::StrAppend(&text, ", ", one.tokens, " of ", one.wanted_tokens, " tokens");
    if (one.state == client::CalibrationState::kReady && !one.installed)
      absl::StrAppend(&text, ", not installed");
    absl::StrAppend(&text, one.problem.empty() ? "" : ", ", Printable(one.problem), "\n");
  }
  for (const client::InstalledProfile& one : report.installed) {
    begin(one.model, one.tenant);
    absl::StrAppend(&text, "profile ", one.revision, " is installed, ",
                    one.after_rope ? "after RoPE" : "before RoPE", "; ", one.sequences,
                    " open sequences have it\n");
  }
  return text;
}

std::string Contents(const DaemonSnapshot& snapshot) {
  const ServerStats& stats = snapshot.stats;
  std::string text = absl::StrCat(
      "sequences  ", stats.sequences, " of ", snapshot.info.max_sequences, " with ", stats.tokens,
      " tokens; models: ",
      snapshot.info.models.empty() ? "none" : Printable(absl::StrJoin(snapshot.info.models, ", ")), "\n");
  absl::StrAppend(&text, "stored     ", FormatBytes(stats.stored_bytes));
  if (stats.stored_bytes > 0) {
    absl::StrAppendFormat(&text, ", in f16 %s: %.2f bits per value", FormatBytes(stats.f16_equivalent_bytes),
                          stats.bits_per_value);
  }
  absl::StrAppend(&text, "\nmoved      ", FormatBytes(stats.moved_bytes), " in ", stats.moves,
                  " block moves (", stats.failed_moves, " failed); ", stats.dropped_blocks,
                  " blocks dropped; ", stats.compacted_blocks, " compacted\n");
  int64_t degraded = 0, freed = 0;
  for (const client::TierStats& tier : stats.tiers) {
    degraded += tier.degraded_blocks;
    freed += tier.degraded_bytes;
  }
  if (degraded > 0)
    absl::StrAppend(&text, "degraded   ", degraded,
                    " times a block was recoded to fewer bits for room, which has freed ", FormatBytes(freed),
                    "\n");
  absl::StrAppend(&text, "attended   ", stats.attended_blocks, " blocks, ",
                  PercentText(static_cast<double>(stats.attended_blocks_below_first_tier),
                              static_cast<double>(stats.attended_blocks)),
                  " of them below the first tier\n");
  for (const client::TierStats& tier : stats.tiers)
    if (tier.attended_in_place + tier.promoted_first > 0)
      absl::StrAppend(&text, "           over blocks in ", Printable(tier.name), " ", tier.attended_in_place,
                      " times where they lie, ", tier.promoted_first, " times after they were brought up (",
                      FormatBytes(static_cast<int64_t>(tier.attend_bytes_per_second)), "/s attended there, ",
                      FormatBytes(static_cast<int64_t>(tier.promote_bytes_per_second)), "/s brought up)\n");
  int64_t low = 0, high = 0;
  for (const client::TierStats& tier : stats.tiers) {
    low += tier.low_priority_blocks;
    high += tier.high_priority_blocks;
  }
  if (low + high > 0)
    absl::StrAppend(&text, "priority   ", high, " blocks high, ", low, " low, the others normal\n");
  if (stats.durable_sequences > 0 || stats.persisted > 0 || stats.failed_persists > 0)
    absl::StrAppend(&text, "durable    ", stats.durable_sequences, " sequences; made durable ",
                    stats.persisted, " times (", stats.failed_persists, " failed), ",
                    FormatBytes(stats.persisted_bytes), " written\n");
  if (stats.prefix_lookups > 0 || stats.prefix_blocks > 0) {
    int64_t hits = 0;
    for (const client::TierStats& tier : stats.tiers) hits += tier.prefix_hit_tokens;
    absl::StrAppend(
        &text, "prefixes   ", stats.prefix_blocks, " blocks, ", FormatBytes(stats.prefix_alone_bytes),
        " that no sequence has; ", stats.prefix_lookups, " lookups found ",
        PercentText(static_cast<double>(hits), static_cast<double>(hits + stats.prefix_miss_tokens)),
        " of their tokens, ", stats.prefix_reused_tokens, " tokens were not computed again\n");
  }
  absl::StrAppend(&text, Profiles(snapshot.profiles));
  std::vector<std::string> memory;
  for (const client::MemoryUse& use : stats.memory)
    memory.push_back(absl::StrCat(use.part, " ", FormatBytes(use.actual_bytes),
                                  use.part == "host" ? " of at most " : ", predicted ",
                                  FormatBytes(use.predicted_bytes)));
  if (!memory.empty()) absl::StrAppend(&text, "memory     ", absl::StrJoin(memory, "; "), "\n");
  absl::StrAppend(&text, "no room    ", stats.exhausted, " calls; checksum failures ",
                  stats.checksum_failures, "\n");
  if (stats.deferred_seals > 0 || stats.failed_seals > 0)
    absl::StrAppend(&text, "left f16   until the next append: ", stats.deferred_seals,
                    " times for want of room, ", stats.failed_seals, " blocks by errors\n");
  return text;
}

Json CalibrationsJson(const client::CalibrationReport& report) {
  Json list = Json::array();
  for (const client::Calibration& one : report.calibrations)
    list.push_back({{"model", one.model},
                    {"tenant", one.tenant},
                    {"state", client::NameOf(one.state)},
                    {"tokens", one.tokens},
                    {"wanted_tokens", one.wanted_tokens},
                    {"after_rope", one.after_rope},
                    {"installed", one.installed},
                    {"problem", one.problem}});
  return list;
}

Json InstalledJson(const client::CalibrationReport& report) {
  Json list = Json::array();
  for (const client::InstalledProfile& one : report.installed)
    list.push_back({{"model", one.model},
                    {"tenant", one.tenant},
                    {"revision", one.revision},
                    {"after_rope", one.after_rope},
                    {"sequences", one.sequences}});
  return list;
}

// What was refused since the start; empty where nothing was.
std::string RefusedLine(const ServerStats& stats) {
  return stats.refused.empty() ? "" : absl::StrCat("refused: ", RefusedText(stats), "\n");
}

// Methods that were called, with their errors.
std::string Calls(const ServerStats& stats, const Terminal& terminal) {
  if (stats.methods.empty()) return "";
  Table table({{"calls", Align::kLeft}, {"number"}, {"p50"}, {"p99"}, {"failed", Align::kLeft}});
  for (const client::MethodStats& method : stats.methods)
    table.AddRow({method.method, absl::StrCat(method.calls), LatencyText(method.p50_seconds),
                  LatencyText(method.p99_seconds), FailedText(method)},
                 method.failed.empty() ? Paint::kPlain : Paint::kYellow);
  return absl::StrCat("\n", table.Render(terminal), RefusedLine(stats));
}

// By which way clients come, and the clients that call most.
std::string Ways(const ServerStats& stats, const Terminal& terminal) {
  constexpr size_t kShown = 10;
  if (stats.ways.empty()) return "";
  Table ways({{"way", Align::kLeft}, {"clients"}, {"calls"}, {"steps"}, {"received"}, {"sent"}});
  int64_t connected = 0;
  for (const client::WayStats& way : stats.ways) {
    connected += way.clients;
    ways.AddRow({WayText(way.way), absl::StrCat(way.clients), absl::StrCat(way.calls),
                 absl::StrCat(way.steps), FormatBytes(way.received_bytes), FormatBytes(way.sent_bytes)});
  }
  std::string text = absl::StrCat("\n", ways.Render(terminal));
  const size_t shown = std::min(kShown, stats.clients.size());
  if (shown == 0) return text;
  Table clients({{"client", Align::kLeft},
                 {"way", Align::kLeft},
                 {"tenant", Align::kLeft},
                 {"calls"},
                 {"steps"},
                 {"received"},
                 {"sent"},
                 {"idle"},
                 {"connected"}});
  for (size_t i = 0; i < shown; i++) {
    const client::ClientStats& one = stats.clients[i];
    clients.AddRow({one.name, WayText(one.way), one.tenant, absl::StrCat(one.calls), absl::StrCat(one.steps),
                    FormatBytes(one.received_bytes), FormatBytes(one.sent_bytes),
                    DurationText(one.idle_seconds), DurationText(one.connected_seconds)});
  }
  absl::StrAppend(&text, "\n", clients.Render(terminal));
  if (connected > static_cast<int64_t>(shown))
    absl::StrAppend(&text, "and ", connected - static_cast<int64_t>(shown),
                    " more, with fewer calls or of other tenants\n");
  return text;
}

Json WaysJson(const ServerStats& stats) {
  Json ways = Json::array();
  for (const client::WayStats& way : stats.ways)
    ways.push_back({{"way", way.way},
                    {"clients", way.clients},
                    {"calls", way.calls},
                    {"steps", way.steps},
                    {"received_bytes", way.received_bytes},
                    {"sent_bytes", way.sent_bytes}});
  return ways;
}

Json ClientsJson(const ServerStats& stats) {
  Json clients = Json::array();
  for (const client::ClientStats& one : stats.clients)
    clients.push_back({{"name", one.name},
                       {"way", one.way},
                       {"tenant", one.tenant},
                       {"calls", one.calls},
                       {"steps", one.steps},
                       {"received_bytes", one.received_bytes},
                       {"sent_bytes", one.sent_bytes},
                       {"connected_seconds", one.connected_seconds},
                       {"idle_seconds", one.idle_seconds}});
  return clients;
}

Json TierJson(const TierStats& tier) {
  Json pairs = Json::array();
  for (const client::PairStats& pair : tier.pairs) {
    pairs.push_back({{"pair", pair.pair}, {"blocks", pair.blocks}, {"bytes", pair.bytes}});
  }
  return {{"name", tier.name},
          {"backend", tier.backend},
          {"device", tier.device},
          {"capacity_bytes", tier.capacity_bytes},
          {"used_bytes", tier.used_bytes},
          {"largest_free_bytes", tier.largest_free_bytes},
          {"blocks", tier.blocks},
          {"pinned_blocks", tier.pinned_blocks},
          {"demoted_blocks", tier.demoted_blocks},
          {"promoted_blocks", tier.promoted_blocks},
          {"dropped_blocks", tier.dropped_blocks},
          {"degraded_blocks", tier.degraded_blocks},
          {"degraded_bytes", tier.degraded_bytes},
          {"lost_blocks", tier.lost_blocks},
          {"attended_in_place", tier.attended_in_place},
          {"promoted_first", tier.promoted_first},
          {"attend_bytes_per_second", tier.attend_bytes_per_second},
          {"promote_bytes_per_second", tier.promote_bytes_per_second},
          {"low_priority_blocks", tier.low_priority_blocks},
          {"high_priority_blocks", tier.high_priority_blocks},
          {"io", tier.io},
          {"problem", tier.problem},
          {"read_bytes", tier.read_bytes},
          {"written_bytes", tier.written_bytes},
          {"read_errors", tier.read_errors},
          {"write_errors", tier.write_errors},
          {"checksum_errors", tier.checksum_errors},
          {"sync_errors", tier.sync_errors},
          {"encrypted", tier.encrypted},
          {"pairs", pairs}};
}

int64_t BytesOf(const SequenceInfo& sequence) {
  int64_t bytes = 0;
  for (const client::TierShare& tier : sequence.tiers) bytes += tier.bytes;
  return bytes;
}

// Empty where one tenant has all.
std::string Tenants(const std::vector<SequenceInfo>& sequences, const Terminal& terminal) {
  constexpr size_t kShown = 10;
  const std::vector<TenantTotal> totals = TotalsOfTenants(sequences);
  if (totals.size() < 2) return "";
  Table table({{"tenant", Align::kLeft}, {"sequences"}, {"tokens"}, {"bytes"}, {"idle"}});
  for (size_t i = 0; i < std::min(kShown, totals.size()); i++)
    table.AddRow({totals[i].tenant, absl::StrCat(totals[i].sequences), absl::StrCat(totals[i].tokens),
                  FormatBytes(totals[i].bytes), DurationText(totals[i].idle_seconds)});
  std::string text = absl::StrCat("\n", table.Render(terminal));
  if (totals.size() > kShown) absl::StrAppend(&text, "and ", totals.size() - kShown, " tenants with less\n");
  return text;
}

const char* PriorityText(client::Priority priority) {
  return priority == client::Priority::kLow ? "low" : priority == client::Priority::kHigh ? "high" : "normal";
}

Json SequenceJson(const SequenceInfo& sequence) {
  Json tiers = Json::array(), degraded = Json::array();
  for (const client::DegradedTokens& tokens : sequence.degraded)
    degraded.push_back({{"layer_group", tokens.layer_group},
                        {"first_token", tokens.first_token},
                        {"tokens", tokens.tokens},
                        {"pair", tokens.pair}});
  for (const client::TierShare& tier : sequence.tiers) {
    tiers.push_back(
        {{"tier", tier.tier}, {"device", tier.device}, {"blocks", tier.blocks}, {"bytes", tier.bytes}});
  }
  return {{"id", absl::StrCat(sequence.id)},
          {"forked_from", sequence.forked_from == 0 ? Json() : Json(absl::StrCat(sequence.forked_from))},
          {"model", sequence.model},
          {"pair", sequence.pair},
          {"tenant", sequence.tenant},
          {"device", sequence.device},
          {"tokens", sequence.tokens},
          {"shared_blocks", sequence.shared_blocks},
          {"dropped_blocks", sequence.dropped_blocks},
          {"degraded_blocks", sequence.degraded_blocks},
          {"degrade", sequence.degrade},
          {"degraded", degraded},
          {"durable", sequence.durable},
          {"durable_tokens", sequence.durable_tokens},
          {"pinned_seconds", sequence.pinned_seconds},
          {"priority", PriorityText(sequence.priority)},
          {"known_tokens", sequence.known_tokens},
          {"reused_tokens", sequence.reused_tokens},
          {"idle_seconds", sequence.idle_seconds},
          {"age_seconds", sequence.age_seconds},
          {"tiers", tiers}};
}

}  // namespace

std::string TierName(const SequenceInfo& sequence, const client::TierShare& share) {
  const auto devices =
      std::count_if(sequence.tiers.begin(), sequence.tiers.end(),
                    [&](const client::TierShare& other) { return other.tier == share.tier; });
  return devices > 1 ? absl::StrCat(share.tier, " ", share.device) : share.tier;
}

std::vector<TenantTotal> TotalsOfTenants(const std::vector<SequenceInfo>& sequences) {
  std::map<std::string, TenantTotal> totals;
  for (const SequenceInfo& sequence : sequences) {
    TenantTotal& total = totals[sequence.tenant];
    total.idle_seconds =
        total.sequences == 0 ? sequence.idle_seconds : std::min(total.idle_seconds, sequence.idle_seconds);
    total.tenant = sequence.tenant;
    total.sequences++;
    total.tokens += sequence.tokens;
    total.bytes += BytesOf(sequence);
  }
  std::vector<TenantTotal> sorted;
  for (auto& [tenant, total] : totals) sorted.push_back(std::move(total));
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const TenantTotal& a, const TenantTotal& b) { return a.bytes > b.bytes; });
  return sorted;
}

std::string RenderSequences(std::vector<SequenceInfo> sequences, size_t max_sequences,
                            const Terminal& terminal, SequenceOrder order) {
  if (sequences.empty() || max_sequences == 0) return "";
  std::stable_sort(sequences.begin(), sequences.end(), [order](const SequenceInfo& a, const SequenceInfo& b) {
    if (order == SequenceOrder::kLargest) return BytesOf(a) > BytesOf(b);
    return order == SequenceOrder::kHottest ? a.idle_seconds < b.idle_seconds
                                            : a.idle_seconds > b.idle_seconds;
  });
  Table table({{"sequence", Align::kLeft},
               {"tenant", Align::kLeft},
               {"model", Align::kLeft},
               {"pair", Align::kLeft},
               {"tokens"},
               {"bytes by tier", Align::kLeft},
               {"idle"},
               {"age"},
               {"dropped"}});
  const size_t shown = std::min(max_sequences, sequences.size());
  for (size_t i = 0; i < shown; ++i) {
    const SequenceInfo& sequence = sequences[i];
    std::vector<std::string> tiers;
    for (const client::TierShare& tier : sequence.tiers) {
      if (tier.bytes > 0)
        tiers.push_back(absl::StrCat(TierName(sequence, tier), " ", FormatBytes(tier.bytes)));
    }
    table.AddRow(
        {absl::StrCat(sequence.id), sequence.tenant, sequence.model, sequence.pair,
         absl::StrCat(sequence.tokens), absl::StrJoin(tiers, ", "), DurationText(sequence.idle_seconds),
         DurationText(sequence.age_seconds), absl::StrCat(sequence.dropped_blocks)},
        sequence.dropped_blocks > 0 ? Paint::kYellow : Paint::kPlain);
  }
  std::string text = absl::StrCat("\n", table.Render(terminal));
  if (shown < sequences.size()) {
    absl::StrAppend(&text, "and ", sequences.size() - shown, " more, ",
                    order == SequenceOrder::kLargest   ? "smaller"
                    : order == SequenceOrder::kHottest ? "not used since these"
                                                       : "used later than these",
                    " (--sequences)\n");
  }
  return text;
}

std::string RenderSequencesJson(const std::vector<SequenceInfo>& sequences) {
  Json list = Json::array();
  for (const SequenceInfo& sequence : sequences) list.push_back(SequenceJson(sequence));
  return JsonText(list);
}

std::string RenderSequence(const SequenceInfo& sequence) {
  std::string text =
      absl::StrCat("sequence   ", sequence.id, " of tenant ", Printable(sequence.tenant), ", model ",
                   Printable(sequence.model), ", ", Printable(sequence.pair), "\n");
  if (sequence.forked_from != 0) absl::StrAppend(&text, "fork of    ", sequence.forked_from, "\n");
  absl::StrAppend(&text, "tokens     ", sequence.tokens,
                  sequence.max_layer_tokens != sequence.tokens
                      ? absl::StrCat(", up to ", sequence.max_layer_tokens, " in some layers")
                      : "",
                  "; exact: first ", sequence.exact_window.first_blocks, " and last ",
                  sequence.exact_window.last_blocks, " blocks",
                  sequence.seal_at_once ? "; evaluation mode" : "", "\n");
  for (const client::TierShare& tier : sequence.tiers)
    absl::StrAppend(
        &text, "in ", TierName(sequence, tier),
        std::string(std::max<size_t>(1, 8 - std::min<size_t>(7, TierName(sequence, tier).size())), ' '),
        tier.blocks, " blocks, ", FormatBytes(tier.bytes), "\n");
  absl::StrAppend(&text, "blocks     ", sequence.shared_blocks, " shared with other sequences, ",
                  sequence.dropped_blocks, " dropped\n");
  if (!sequence.degrade.empty())
    absl::StrAppend(&text, "degraded   ", sequence.degraded_blocks, " blocks; cold ones may become ",
                    Printable(absl::StrJoin(sequence.degrade, ", then ")), " when room is needed\n");
  for (const client::DegradedTokens& tokens : sequence.degraded)
    absl::StrAppend(&text, "           tokens ", tokens.first_token, " to ",
                    tokens.first_token + tokens.tokens - 1, " of layer group ", tokens.layer_group, " are ",
                    Printable(tokens.pair), "\n");
  absl::StrAppend(&text, "durable    ",
                  sequence.durable ? absl::StrCat("its first ", sequence.durable_tokens, " tokens") : "no",
                  "\npriority   ", PriorityText(sequence.priority), "\n", "prefix     ",
                  sequence.known_tokens > 0
                      ? absl::StrCat("the ids of ", sequence.known_tokens, " tokens are known, ",
                                     sequence.reused_tokens, " of them were there before")
                      : "its token ids are not known",
                  "\n", "used       ", DurationText(sequence.idle_seconds), " ago, made ",
                  DurationText(sequence.age_seconds), " ago, on ", Printable(sequence.device), "\n");
  return text;
}

std::string RenderTroubles(const ServerStats& stats, const Terminal& terminal) {
  std::string text;
  for (const client::Trouble& trouble : stats.troubles)
    absl::StrAppend(&text,
                    terminal.Painted(absl::StrCat("trouble: ", Printable(trouble.what), " for ",
                                                  DurationText(trouble.seconds),
                                                  trouble.text.empty() ? "" : ": ", Printable(trouble.text)),
                                     Paint::kRed),
                    "\n");
  return text;
}

std::string LatencyText(double seconds) {
  if (seconds <= 0) return "-";
  return seconds < 1e-3  ? absl::StrFormat("%.0f us", seconds * 1e6)
         : seconds < 1.0 ? absl::StrFormat("%.1f ms", seconds * 1e3)
                         : absl::StrFormat("%.1f s", seconds);
}

std::string FailedText(const client::MethodStats& method) {
  std::vector<std::string> parts;
  for (const auto& [code, calls] : method.failed) parts.push_back(absl::StrCat(code, " ", calls));
  return absl::StrJoin(parts, ", ");
}

std::string RefusedTenantsText(const ServerStats& stats, const std::string& reason) {
  constexpr size_t kShown = 3;
  std::vector<std::string> parts;
  size_t tenants = 0;
  bool evident = true;
  for (const client::TenantRefusals& of : stats.refused_tenants) {
    if (of.reason != reason) continue;
    // Where there is one tenant, or a caller that is none, it need not be said.
    evident = evident && tenants == 0 && (of.tenant == "default" || of.tenant == "(nobody)");
    if (++tenants <= kShown) parts.push_back(absl::StrCat(Printable(of.tenant), " ", of.calls));
  }
  if (evident) return "";
  return absl::StrCat(absl::StrJoin(parts, ", "), tenants > kShown ? ", ..." : "");
}

std::string RefusedText(const ServerStats& stats) {
  std::vector<std::string> parts;
  for (const auto& [reason, calls] : stats.refused) {
    const std::string tenants = RefusedTenantsText(stats, reason);
    parts.push_back(
        absl::StrCat(Printable(reason), " ", calls, tenants.empty() ? "" : absl::StrCat(" (", tenants, ")")));
  }
  return absl::StrJoin(parts, ", ");
}

std::string WayText(const std::string& way) {
  if (way == "grpc") return "gRPC";
  return way == "shared_memory" ? "shared memory" : way;
}

std::string PercentText(double part, double whole) {
  return whole > 0 ? absl::StrFormat("%.0f %%", 100 * part / whole) : "-";
}

Paint ShareColour(double share, double warn, double alarm) {
  return share < warn ? Paint::kGreen : share < alarm ? Paint::kYellow : Paint::kRed;
}

namespace {

std::string NotServing(const ServerStats& stats) {
  for (const client::Trouble& trouble : stats.troubles)
    if (trouble.ends_service)
      return absl::StrCat("not serving until it is restarted (", Printable(trouble.what), ")");
  return "not serving (starting or stopping)";
}

Json TroublesJson(const ServerStats& stats) {
  Json list = Json::array();
  for (const client::Trouble& trouble : stats.troubles)
    list.push_back({{"what", trouble.what},
                    {"text", trouble.text},
                    {"seconds", trouble.seconds},
                    {"ends_service", trouble.ends_service}});
  return list;
}

}  // namespace

std::string RenderStatus(const DaemonSnapshot& snapshot, size_t max_sequences, const Terminal& terminal,
                         SequenceOrder order) {
  std::string head =
      absl::StrCat("kvtided ", Printable(snapshot.info.version), " at ", Printable(snapshot.address), ", up ",
                   DurationText(snapshot.info.uptime_seconds), ", process ", snapshot.info.process_id);
  return absl::StrCat(terminal.Painted(head, Paint::kBold), ", ",
                      snapshot.serving ? terminal.Painted("serving", Paint::kGreen)
                                       : terminal.Painted(NotServing(snapshot.stats), Paint::kRed),
                      "\n", RenderTroubles(snapshot.stats, terminal), "\n", Tiers(snapshot.stats, terminal),
                      Remote(snapshot.stats, terminal), "\n", Contents(snapshot),
                      Calls(snapshot.stats, terminal), Ways(snapshot.stats, terminal),
                      Tenants(snapshot.sequences, terminal),
                      RenderSequences(snapshot.sequences, max_sequences, terminal, order));
}

std::string RenderStatusJson(const DaemonSnapshot& snapshot) {
  const ServerStats& stats = snapshot.stats;
  Json json = {{"address", snapshot.address},
               {"version", snapshot.info.version},
               {"serving", snapshot.serving},
               {"process_id", snapshot.info.process_id},
               {"uptime_seconds", snapshot.info.uptime_seconds},
               {"default_pair", snapshot.info.default_pair},
               {"models", snapshot.info.models},
               {"sequences", stats.sequences},
               {"max_sequences", snapshot.info.max_sequences},
               {"tokens", stats.tokens},
               {"stored_bytes", stats.stored_bytes},
               {"f16_equivalent_bytes", stats.f16_equivalent_bytes},
               {"bits_per_value", stats.bits_per_value},
               {"shared_blocks", stats.shared_blocks}};
  for (const TierStats& tier : stats.tiers) json["tiers"].push_back(TierJson(tier));
  json["methods"] = Json::array();
  for (const client::MethodStats& method : stats.methods) {
    Json failed = Json::object();
    for (const auto& [code, calls] : method.failed) failed[code] = calls;
    json["methods"].push_back({{"method", method.method},
                               {"calls", method.calls},
                               {"p50_seconds", method.p50_seconds},
                               {"p99_seconds", method.p99_seconds},
                               {"failed", failed}});
  }
  json["refused"] = Json::object();
  for (const auto& [reason, calls] : stats.refused) json["refused"][reason] = calls;
  json["refused_tenants"] = Json::array();
  for (const client::TenantRefusals& of : stats.refused_tenants)
    json["refused_tenants"].push_back({{"tenant", of.tenant}, {"reason", of.reason}, {"calls", of.calls}});
  json["counters"] = {{"sequences_created", stats.sequences_created},
                      {"sequences_closed", stats.sequences_closed},
                      {"appended_tokens", stats.appended_tokens},
                      {"sealed_blocks", stats.sealed_blocks},
                      {"deferred_seals", stats.deferred_seals},
                      {"failed_seals", stats.failed_seals},
                      {"copied_on_write_blocks", stats.copied_on_write_blocks},
                      {"window_freed_blocks", stats.window_freed_blocks},
                      {"evict_calls", stats.evict_calls},
                      {"prefetch_calls", stats.prefetch_calls},
                      {"moves", stats.moves},
                      {"failed_moves", stats.failed_moves},
                      {"moved_bytes", stats.moved_bytes},
                      {"dropped_blocks", stats.dropped_blocks},
                      {"attended_blocks", stats.attended_blocks},
                      {"attended_blocks_below_first_tier", stats.attended_blocks_below_first_tier},
                      {"checksum_failures", stats.checksum_failures},
                      {"exhausted", stats.exhausted},
                      {"lost_blocks", stats.lost_blocks},
                      {"persist_calls", stats.persist_calls},
                      {"persisted", stats.persisted},
                      {"failed_persists", stats.failed_persists},
                      {"persisted_bytes", stats.persisted_bytes},
                      {"durable_sequences", stats.durable_sequences},
                      {"compacted_blocks", stats.compacted_blocks},
                      {"compacted_bytes", stats.compacted_bytes},
                      {"prefix_blocks", stats.prefix_blocks},
                      {"prefix_alone_bytes", stats.prefix_alone_bytes},
                      {"durable_prefix_blocks", stats.durable_prefix_blocks},
                      {"prefix_lookups", stats.prefix_lookups},
                      {"prefix_miss_tokens", stats.prefix_miss_tokens},
                      {"prefix_reused_tokens", stats.prefix_reused_tokens}};
  json["memory"] = Json::array();
  for (const client::MemoryUse& use : stats.memory)
    json["memory"].push_back(
        {{"part", use.part}, {"predicted_bytes", use.predicted_bytes}, {"actual_bytes", use.actual_bytes}});
  json["troubles"] = TroublesJson(stats);
  json["ways"] = WaysJson(stats);
  json["remote"] = RemoteJson(stats);
  json["clients"] = ClientsJson(stats);
  json["calibrations"] = CalibrationsJson(snapshot.profiles);
  json["installed_profiles"] = InstalledJson(snapshot.profiles);
  json["tenants"] = Json::array();
  for (const TenantTotal& total : TotalsOfTenants(snapshot.sequences))
    json["tenants"].push_back({{"tenant", total.tenant},
                               {"sequences", total.sequences},
                               {"tokens", total.tokens},
                               {"bytes", total.bytes},
                               {"idle_seconds", total.idle_seconds}});
  json["sequence_list"] = Json::array();
  for (const SequenceInfo& sequence : snapshot.sequences)
    json["sequence_list"].push_back(SequenceJson(sequence));
  return JsonText(json);
}

}  // namespace kvtide::cli
