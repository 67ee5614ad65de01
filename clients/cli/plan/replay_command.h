// `kvtide fleet replay`: plays recorded or generated prompts against caches of several sizes and eviction
// policies, with the daemon's own code (daemon/trace). Exit codes: command_status.h.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cli/terminal/terminal.h"
#include "daemon/trace/replay.h"

namespace kvtide::cli {

// What was played, and one row for each size and policy.
struct ReplayReport {
  std::string source;  // "conversation (generated, seed 1)", a file
  uint64_t requests = 0, distinct_bytes = 0;
  std::vector<std::string> notes;  // what the reader of the numbers has to know
  struct Row {
    uint64_t host_bytes = 0, disk_bytes = 0;
    EvictionKind eviction = EvictionKind::kLru;
    ReplayResult result;
    double seconds = 0;
  };
  std::vector<Row> rows;
};
std::string ReplayTable(const ReplayReport& report, const Terminal& terminal);
std::string ReplayJson(const ReplayReport& report);

// Runs in the callback of the subcommand and leaves the exit code in *exit_code, which outlives the app.
void AddReplayCommand(CLI::App& fleet, int* exit_code);

}  // namespace kvtide::cli
