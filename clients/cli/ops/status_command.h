// `kvtide status`: what a running daemon holds.
#pragma once

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "clients/cli/ops/daemon_flags.h"
#include "clients/cli/ops/status_report.h"

namespace kvtide::cli {

// Exit codes: 0, 1 (the daemon cannot be reached), 2 (bad input).
void AddStatusCommand(CLI::App& app, int* exit_code);

// "coldest", "hottest" or "largest".
SequenceOrder OrderOf(const std::string& text);

// Asks for everything that `status` shows.
absl::StatusOr<DaemonSnapshot> TakeSnapshot(client::Client& client);

}  // namespace kvtide::cli
