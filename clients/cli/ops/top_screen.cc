#include "clients/cli/ops/top_screen.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "clients/cli/terminal/table.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using client::SequenceInfo;
using client::ServerStats;
using client::TierStats;
using planner::FormatBytes;

constexpr double kNearlyFull = 0.90, kFull = 0.97;
constexpr int kBarWidth = 30;

class Rates {
 public:
  Rates(const ServerStats& before, const ServerStats& now, double seconds)
      : now_(now),
        seconds_(seconds),
        restarted_(now.uptime_seconds < before.uptime_seconds),
        before_(restarted_ ? ServerStats() : before) {}

  // Per second. A counter of a tier is found in both snapshots by the tier's place.
  double Of(int64_t ServerStats::*counter) const { return PerSecond(before_.*counter, now_.*counter); }
  // Of a method, which is found in the earlier snapshot by its name.
  double OfCalls(const client::MethodStats& method) const {
    const client::MethodStats* const before = Before(method);
    return PerSecond(before != nullptr ? before->calls : 0, method.calls);
  }
  double OfErrors(const client::MethodStats& method) const {
    const client::MethodStats* const before = Before(method);
    return PerSecond(before != nullptr ? Errors(*before) : 0, Errors(method));
  }
  double OfRefused() const { return PerSecond(Refused(before_), Refused(now_)); }
  double OfWay(size_t way, int64_t client::WayStats::*counter) const {
    return PerSecond(way < before_.ways.size() ? before_.ways[way].*counter : 0, now_.ways[way].*counter);
  }
  double OfTier(size_t tier, int64_t TierStats::*counter) const {
    return PerSecond(tier < before_.tiers.size() ? before_.tiers[tier].*counter : 0,
                     now_.tiers[tier].*counter);
  }

 private:
  static int64_t Refused(const ServerStats& stats) {
    int64_t all = 0;
    for (const auto& [reason, calls] : stats.refused) all += calls;
    return all;
  }
  static int64_t Errors(const client::MethodStats& method) {
    int64_t errors = 0;
    for (const auto& [code, calls] : method.failed) errors += calls;
    return errors;
  }
  const client::MethodStats* Before(const client::MethodStats& method) const {
    for (const client::MethodStats& before : before_.methods)
      if (before.method == method.method) return &before;
    return nullptr;
  }
  double PerSecond(int64_t before, int64_t now) const {
    return seconds_ > 0 ? static_cast<double>(std::max<int64_t>(0, now - before)) / seconds_ : 0;
  }

  const ServerStats& now_;
  const double seconds_;
  const bool restarted_;
  const ServerStats before_;
};

std::string Bar(double share) {
  const int full = std::clamp(static_cast<int>(share * kBarWidth + 0.5), 0, kBarWidth);
  return absl::StrCat("[", std::string(full, '#'), std::string(kBarWidth - full, '.'), "]");
}

std::string RateText(double rate) { return absl::StrCat(CountText(rate), "/s"); }
std::string ByteRateText(double rate) { return absl::StrCat(FormatBytes(static_cast<int64_t>(rate)), "/s"); }

void AppendTiers(const ServerStats& stats, const Rates& rates, const Terminal& terminal, std::string* text) {
  Table table({{"tier", Align::kLeft},
               {"", Align::kLeft},
               {"full"},
               {"used"},
               {"of"},
               {"blocks"},
               {"demoted"},
               {"promoted"},
               {"dropped"}});
  for (size_t i = 0; i < stats.tiers.size(); ++i) {
    const TierStats& tier = stats.tiers[i];
    const double share = tier.capacity_bytes > 0
                             ? static_cast<double>(tier.used_bytes) / static_cast<double>(tier.capacity_bytes)
                             : 0;
    const bool several = std::count_if(stats.tiers.begin(), stats.tiers.end(),
                                       [&](const TierStats& other) { return other.name == tier.name; }) > 1;
    table.AddRow(
        {several ? absl::StrCat(tier.name, " ", tier.device) : tier.name, Bar(share), PercentText(share, 1),
         FormatBytes(tier.used_bytes), FormatBytes(tier.capacity_bytes),
         CountText(static_cast<double>(tier.blocks)), RateText(rates.OfTier(i, &TierStats::demoted_blocks)),
         RateText(rates.OfTier(i, &TierStats::promoted_blocks)),
         RateText(rates.OfTier(i, &TierStats::dropped_blocks))},
        ShareColour(share, kNearlyFull, kFull));
  }
  absl::StrAppend(text, table.Render(terminal));
}

void AppendRates(const ServerStats& stats, const Rates& rates, std::string* text) {
  const double attended = rates.Of(&ServerStats::attended_blocks);
  absl::StrAppend(text, "appended ", CountText(rates.Of(&ServerStats::appended_tokens)),
                  " tokens/s   sealed ", CountText(rates.Of(&ServerStats::sealed_blocks)),
                  " blocks/s   attended ", CountText(attended), " blocks/s (",
                  PercentText(rates.Of(&ServerStats::attended_blocks_below_first_tier), attended),
                  " below the first tier)\n");
  absl::StrAppend(
      text, "moved ", ByteRateText(rates.Of(&ServerStats::moved_bytes)), " in ",
      CountText(rates.Of(&ServerStats::moves)), " moves/s (", CountText(rates.Of(&ServerStats::failed_moves)),
      " failed/s)   no room ", CountText(rates.Of(&ServerStats::exhausted)), " calls/s   checksum failures ",
      stats.checksum_failures, "   dropped ", stats.dropped_blocks, "   lost ", stats.lost_blocks, "\n");
}

// Clients by the way by which they come, and what they ask for.
void AppendWays(const ServerStats& stats, const Rates& rates, std::string* text) {
  if (stats.ways.empty()) return;
  std::vector<std::string> ways;
  for (size_t i = 0; i < stats.ways.size(); i++)
    ways.push_back(absl::StrCat(WayText(stats.ways[i].way), " ", stats.ways[i].clients, " (",
                                RateText(rates.OfWay(i, &client::WayStats::calls)), " calls, ",
                                RateText(rates.OfWay(i, &client::WayStats::steps)), " steps, ",
                                ByteRateText(rates.OfWay(i, &client::WayStats::received_bytes) +
                                             rates.OfWay(i, &client::WayStats::sent_bytes)),
                                ")"));
  absl::StrAppend(text, "clients: ", absl::StrJoin(ways, "   "), "\n");
}

// The busiest methods: calls and errors a second, latency since the start, errors by code.
void AppendCalls(const ServerStats& stats, const Rates& rates, const Terminal& terminal, std::string* text) {
  constexpr size_t kShown = 6;
  if (stats.methods.empty()) return;
  Table table(
      {{"calls", Align::kLeft}, {"rate"}, {"errors"}, {"p50"}, {"p99"}, {"failed so far", Align::kLeft}});
  for (size_t i = 0; i < std::min(kShown, stats.methods.size()); ++i) {
    const client::MethodStats& method = stats.methods[i];
    const double errors = rates.OfErrors(method);
    table.AddRow({method.method, RateText(rates.OfCalls(method)), RateText(errors),
                  LatencyText(method.p50_seconds), LatencyText(method.p99_seconds), FailedText(method)},
                 errors > 0 ? Paint::kYellow : Paint::kPlain);
  }
  absl::StrAppend(text, "\n", table.Render(terminal));
  if (!stats.refused.empty())
    absl::StrAppend(text, "refused: ", RateText(rates.OfRefused()), " (so far ", RefusedText(stats), ")\n");
}

// The tenants with most bytes, where there are several.
void AppendTenants(const std::vector<SequenceInfo>& sequences, const Terminal& terminal, std::string* text) {
  constexpr size_t kShown = 5;
  const std::vector<TenantTotal> totals = TotalsOfTenants(sequences);
  if (totals.size() < 2) return;
  Table table({{"tenant", Align::kLeft}, {"sequences"}, {"tokens"}, {"bytes"}, {"idle"}});
  for (size_t i = 0; i < std::min(kShown, totals.size()); i++)
    table.AddRow({totals[i].tenant, absl::StrCat(totals[i].sequences),
                  CountText(static_cast<double>(totals[i].tokens)), FormatBytes(totals[i].bytes),
                  DurationText(totals[i].idle_seconds)});
  absl::StrAppend(text, "\n", table.Render(terminal));
}

void AppendSequences(std::vector<SequenceInfo> sequences, int lines, const Terminal& terminal,
                     SequenceOrder order, std::string* text) {
  if (lines < 2 || sequences.empty()) return;
  std::stable_sort(sequences.begin(), sequences.end(), [order](const SequenceInfo& a, const SequenceInfo& b) {
    if (order == SequenceOrder::kLargest) return a.tokens > b.tokens;
    return order == SequenceOrder::kHottest ? a.idle_seconds < b.idle_seconds
                                            : a.idle_seconds > b.idle_seconds;
  });
  Table table({{"sequence", Align::kLeft},
               {"model", Align::kLeft},
               {"pair", Align::kLeft},
               {"tokens"},
               {"bytes"},
               {"tiers", Align::kLeft},
               {"idle"}});
  for (size_t i = 0; i < sequences.size() && i + 1 < static_cast<size_t>(lines); ++i) {
    const SequenceInfo& sequence = sequences[i];
    int64_t bytes = 0;
    for (const client::TierShare& tier : sequence.tiers) bytes += tier.bytes;
    std::vector<std::string> tiers;
    for (const client::TierShare& tier : sequence.tiers) {
      if (tier.bytes > 0) {
        tiers.push_back(
            absl::StrCat(TierName(sequence, tier), " ",
                         PercentText(static_cast<double>(tier.bytes), static_cast<double>(bytes))));
      }
    }
    table.AddRow({absl::StrCat(sequence.id), sequence.model, sequence.pair, absl::StrCat(sequence.tokens),
                  FormatBytes(bytes), absl::StrJoin(tiers, ", "), DurationText(sequence.idle_seconds)});
  }
  absl::StrAppend(text, "\n", table.Render(terminal));
}

// The first `width` columns; escape sequences stay whole.
std::string Cut(const std::string& line, int width) {
  if (DisplayWidth(line) <= width) return line;
  std::string cut;
  int columns = 0;
  for (size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '\x1b') {
      const size_t end = line.find('m', i);
      if (end == std::string::npos) break;
      cut.append(line, i, end - i + 1);
      i = end;
      continue;
    }
    const bool begins = (static_cast<unsigned char>(line[i]) & 0xC0) != 0x80;
    if (begins) ++columns;
    if (columns <= width) cut += line[i];
  }
  return cut;
}

}  // namespace

std::string RenderTop(const DaemonSnapshot& before, const DaemonSnapshot& now, double seconds, int height,
                      const Terminal& terminal, SequenceOrder order) {
  const ServerStats& stats = now.stats;
  const Rates rates(before.stats, stats, seconds);
  std::string text = terminal.Painted(
      absl::StrCat("kvtided ", Printable(now.info.version), " at ", Printable(now.address), ", up ",
                   DurationText(stats.uptime_seconds), now.serving ? "" : ", NOT SERVING"),
      Paint::kBold);
  absl::StrAppend(&text, "\n", RenderTroubles(stats, terminal), "\n");
  AppendTiers(stats, rates, terminal, &text);
  absl::StrAppend(&text, "\n", stats.sequences, " sequences   ", CountText(static_cast<double>(stats.tokens)),
                  " tokens   ", FormatBytes(stats.stored_bytes), " stored");
  if (stats.stored_bytes > 0) absl::StrAppendFormat(&text, " at %.2f bits per value", stats.bits_per_value);
  absl::StrAppend(&text, "\n");
  AppendRates(stats, rates, &text);
  AppendWays(stats, rates, &text);
  AppendCalls(stats, rates, terminal, &text);
  AppendTenants(now.sequences, terminal, &text);
  const auto used = static_cast<int>(std::count(text.begin(), text.end(), '\n'));
  AppendSequences(now.sequences, height - used - 1, terminal, order, &text);

  std::vector<std::string> lines = absl::StrSplit(text, '\n');
  if (!lines.empty() && lines.back().empty()) lines.pop_back();
  if (height > 0 && lines.size() > static_cast<size_t>(height)) lines.resize(static_cast<size_t>(height));
  for (std::string& line : lines) line = Cut(line, terminal.width());
  return absl::StrCat(absl::StrJoin(lines, "\n"), "\n");
}

}  // namespace kvtide::cli
