#include "clients/cli/plan/replay_command.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "clients/cli/plan/plan_io.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/interrupt.h"
#include "clients/cli/terminal/json_text.h"
#include "clients/cli/terminal/number_checks.h"
#include "clients/cli/terminal/progress.h"
#include "clients/cli/terminal/table.h"
#include "daemon/trace/workload.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"
#include "planner/model/device.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

const char* const kExamples =
    R"(A lookup is a prompt: what the cache has of it is loaded, the rest is computed and stored. What is played: a recording of kvtided
(--record-trace), a file in Mooncake's format (.jsonl), or a workload in the shape of one of Mooncake's traces (FAST 2025). The
cache is kvtided's own, over tiers that hold no bytes.
Examples:
  kvtide fleet replay --trace /var/tmp/kvtide.trace --host-memory 32GiB,64GiB,128GiB
  kvtide fleet replay --workload conversation --host-memory 256GiB --disk 2TiB --output json
  kvtide fleet replay --trace conversation_trace.jsonl --bytes-per-token 135168
  kvtide fleet replay --workload tool-agent --scale 0.2 --seed 7 --eviction lru)";

struct ReplayCommand {
  std::string trace, workload, host, disk, eviction, output = "table";
  WorkloadOptions options;
};

// False once Ctrl-C has come.
bool GoOn(uint64_t) { return !StopAtInterrupt().load(); }

absl::StatusOr<std::vector<uint64_t>> Sizes(const char* flag, const std::string& text) {
  std::vector<uint64_t> sizes;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const absl::StatusOr<int64_t> bytes = planner::ParseBytes(std::string(part));
    KVTIDE_RETURN_IF_ERROR(Annotate(bytes.status(), flag));
    if (*bytes <= 0)
      return absl::InvalidArgumentError(absl::StrCat(flag, ": '", part, "' is no size above 0"));
    sizes.push_back(static_cast<uint64_t>(*bytes));
  }
  return sizes;
}

absl::StatusOr<std::vector<EvictionKind>> Policies(const std::string& text) {
  const std::span<const EvictionKind> all = AllEvictionKinds();
  if (text.empty()) return std::vector<EvictionKind>(all.begin(), all.end());
  std::vector<EvictionKind> kinds;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    KVTIDE_ASSIGN_OR_RETURN(const EvictionKind kind, ParseEvictionKind(std::string(part)));
    kinds.push_back(kind);
  }
  return kinds;
}

absl::StatusOr<std::vector<RecordedEvent>> ReadEvents(const ReplayCommand& command, ReplayReport* report) {
  if (!command.workload.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(const WorkloadShape shape, FindWorkloadShape(command.workload));
    report->source = absl::StrCat(shape.name, " (generated, seed ", command.options.seed, ")");
    report->notes.push_back(
        absl::StrCat(shape.what, "; in the shape of Mooncake's trace of that name, not the trace itself"));
    return MakeWorkload(shape, command.options);
  }
  report->source = command.trace;
  if (absl::EndsWith(command.trace, ".jsonl"))
    return ReadMooncakeTrace(command.trace, command.options.token_bytes, GoOn);
  KVTIDE_ASSIGN_OR_RETURN(Recording recording, ReadRecording(command.trace, GoOn));
  if (recording.missing > 0)
    report->notes.push_back(absl::StrCat(recording.missing, " events are missing in the recording"));
  if (recording.cut_off)
    report->notes.push_back("the recording ends inside an event, as that of a daemon that was killed");
  return std::move(recording.events);
}

absl::StatusOr<ReplayReport> RunReplay(const ReplayCommand& command) {
  if (command.output != "table" && command.output != "json")
    return absl::InvalidArgumentError(absl::StrCat("--output: '", command.output, "'; known: table, json"));
  if (command.trace.empty() == command.workload.empty())
    return absl::InvalidArgumentError(
        "say what to replay: --trace FILE, or --workload conversation, tool-agent or synthetic");
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<EvictionKind> policies, Policies(command.eviction));
  std::vector<uint64_t> hosts, disks = {0};
  if (!command.host.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(hosts, Sizes("--host-memory", command.host));
  }
  if (!command.disk.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(disks, Sizes("--disk", command.disk));
  }
  ReplayReport report;
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<RecordedEvent> events, ReadEvents(command, &report));
  report.requests = static_cast<uint64_t>(std::count_if(
      events.begin(), events.end(), [](const RecordedEvent& event) { return event.Is(TraceVerb::kLookup); }));
  report.distinct_bytes = DistinctBytes(events);
  if (report.requests == 0)
    return absl::InvalidArgumentError(
        absl::StrCat(report.source, " has no lookup: there is nothing to find; record for longer"));
  uint64_t largest = 1;
  for (const RecordedEvent& event : events) largest = std::max(largest, event.block_bytes);
  for (const uint64_t part : {20, 10, 5, 2})
    if (command.host.empty()) hosts.push_back(std::max(report.distinct_bytes / part, 16 * largest));
  hosts.erase(std::unique(hosts.begin(), hosts.end()), hosts.end());

  const auto runs = static_cast<double>(hosts.size() * disks.size() * policies.size());
  Progress progress("replaying", runs * static_cast<double>(events.size()), "events");
  double before = 0;
  for (const uint64_t host : hosts)
    for (const uint64_t disk : disks)
      for (const EvictionKind policy : policies) {
        ReplayOptions options{policy, host, disk, [&](uint64_t played) {
                                progress.Update(before + static_cast<double>(played));
                                return GoOn(played);
                              }};
        const auto start = std::chrono::steady_clock::now();
        ReplayReport::Row row{host, disk, policy, {}, 0};
        KVTIDE_ASSIGN_OR_RETURN(row.result, Replay(events, options));
        row.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        report.rows.push_back(row);
        before += static_cast<double>(events.size());
      }
  progress.Finish();
  return report;
}

std::string Size(uint64_t bytes) { return planner::FormatBytes(static_cast<int64_t>(bytes)); }
std::string Percent(double share) { return absl::StrFormat("%.2f %%", 100 * share); }

}  // namespace

std::string ReplayTable(const ReplayReport& report, const Terminal& terminal) {
  const bool disk = std::any_of(report.rows.begin(), report.rows.end(),
                                [](const ReplayReport::Row& row) { return row.disk_bytes > 0; });
  std::vector<Table::Column> columns = {{"host"}};
  if (disk) columns.push_back({"disk"});
  columns.push_back({"eviction", Align::kLeft});
  for (const char* title : {"tokens found", "blocks found", "stored", "dropped"}) columns.push_back({title});
  if (disk)
    for (const char* title : {"found on disk", "to disk", "from disk"}) columns.push_back({title});
  Table table(columns);
  for (const ReplayReport::Row& row : report.rows) {
    const ReplayResult& result = row.result;
    std::vector<std::string> cells = {Size(row.host_bytes)};
    if (disk) cells.push_back(row.disk_bytes > 0 ? Size(row.disk_bytes) : "none");
    cells.push_back(NameOf(row.eviction));
    cells.push_back(Percent(result.TokenHitRatio()));
    cells.push_back(Percent(result.BlockHitRatio()));
    cells.push_back(Size(result.stored_bytes));
    cells.push_back(CountText(static_cast<double>(result.dropped_blocks)));
    if (disk) {
      cells.push_back(Percent(static_cast<double>(result.disk_hit_blocks) /
                              static_cast<double>(std::max<uint64_t>(1, result.asked_blocks))));
      cells.push_back(Size(result.down_bytes));
      cells.push_back(Size(result.up_bytes));
    }
    // The best of its sizes.
    const bool best =
        std::none_of(report.rows.begin(), report.rows.end(), [&](const ReplayReport::Row& other) {
          return other.host_bytes == row.host_bytes && other.disk_bytes == row.disk_bytes &&
                 other.result.hit_tokens > result.hit_tokens;
        });
    table.AddRow(cells, best && report.rows.size() > 1 ? Paint::kGreen : Paint::kPlain);
  }
  const ReplayResult& first = report.rows.front().result;
  std::string text = absl::StrCat(Printable(report.source), ": ", report.requests, " lookups of ",
                                  CountText(static_cast<double>(first.asked_blocks)), " blocks, ",
                                  CountText(static_cast<double>(first.asked_tokens)),
                                  " tokens; all that is different: ", Size(report.distinct_bytes), "\n");
  for (const std::string& note : report.notes) absl::StrAppend(&text, "note: ", Printable(note), "\n");
  for (const ReplayReport::Row& row : report.rows)
    if (row.result.refused_blocks > 0) {
      absl::StrAppend(&text, "note: some blocks found no room: a prompt is larger than the host tier\n");
      break;
    }
  return text + table.Render(terminal);
}

std::string ReplayJson(const ReplayReport& report) {
  nlohmann::ordered_json json = {{"schema", "kvtide.replay/1"}, {"source", report.source},
                                 {"requests", report.requests}, {"distinct_bytes", report.distinct_bytes},
                                 {"notes", report.notes},       {"results", nlohmann::ordered_json::array()}};
  for (const ReplayReport::Row& row : report.rows) {
    const ReplayResult& result = row.result;
    json["results"].push_back({{"host_bytes", row.host_bytes},
                               {"disk_bytes", row.disk_bytes},
                               {"eviction", NameOf(row.eviction)},
                               {"token_hit_ratio", result.TokenHitRatio()},
                               {"block_hit_ratio", result.BlockHitRatio()},
                               {"asked_tokens", result.asked_tokens},
                               {"hit_tokens", result.hit_tokens},
                               {"asked_blocks", result.asked_blocks},
                               {"hit_blocks", result.hit_blocks},
                               {"host_hit_blocks", result.host_hit_blocks},
                               {"disk_hit_blocks", result.disk_hit_blocks},
                               {"stored_blocks", result.stored_blocks},
                               {"stored_bytes", result.stored_bytes},
                               {"refused_blocks", result.refused_blocks},
                               {"dropped_blocks", result.dropped_blocks},
                               {"host_to_disk_bytes", result.down_bytes},
                               {"disk_to_host_bytes", result.up_bytes},
                               {"seconds", row.seconds}});
  }
  return JsonText(json);
}

void AddReplayCommand(CLI::App& fleet, int* exit_code) {
  auto command = std::make_shared<ReplayCommand>();
  CLI::App* replay = fleet.add_subcommand(
      "replay",
      "Replay recorded or generated prompts against tiers and eviction policies: what is found again");
  replay->footer(kExamples);
  replay->add_option("--trace", command->trace,
                     "A recording of kvtided, or a .jsonl file in Mooncake's format");
  replay->add_option("--workload", command->workload, "Generated: conversation, tool-agent or synthetic");
  replay->add_option(
      "--host-memory", command->host,
      "Sizes of the host tier, such as 64GiB,128GiB (default: 5, 10, 20 and 50 % of all that is "
      "different)");
  replay->add_option("--disk", command->disk, "Sizes of the disk tier (default: none)");
  replay->add_option("--eviction", command->eviction, "Policies to compare (default: all)");
  replay
      ->add_option("--bytes-per-token", command->options.token_bytes,
                   "What a token takes where the source does not say; 33792: Llama 3.1 8B in turbo4/turbo4")
      ->check(Positive())
      ->capture_default_str();
  replay
      ->add_option("--block-tokens", command->options.block_tokens, "Tokens of a block of generated prompts")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  replay->add_option("--scale", command->options.scale, "Part of the workload's requests, in the same time")
      ->check(CLI::Range(0.0001, 100.0))
      ->capture_default_str();
  replay->add_option("--seed", command->options.seed, "Of generated prompts")->capture_default_str();
  replay->add_option("--output", command->output, "table or json")->capture_default_str();
  replay->callback([command, exit_code] {
    const absl::StatusOr<ReplayReport> report = RunReplay(*command);
    absl::Status status = report.status();
    if (report.ok()) {
      Say(command->output == "json" ? ReplayJson(*report) : ReplayTable(*report, Terminal::Of(1)));
      status = FlushOutput();
    }
    SayFailed("kvtide fleet replay", status);
    *exit_code = ExitCode(status);
  });
}

}  // namespace kvtide::cli
