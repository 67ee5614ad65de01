#include "clients/cli/ops/status_command.h"

#include <cstdio>
#include <memory>
#include <string>

#include "clients/cli/terminal/command_status.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

struct StatusFlags {
  DaemonFlags daemon;
  std::string output = "table";
  size_t sequences = 10;
  std::string order = "coldest";
};

absl::Status RunStatus(const StatusFlags& flags) {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, flags.daemon.Connect());
  KVTIDE_ASSIGN_OR_RETURN(const DaemonSnapshot snapshot, TakeSnapshot(*client));
  const std::string text =
      flags.output == "json" ? RenderStatusJson(snapshot)
                             : RenderStatus(snapshot, flags.sequences, Terminal::Of(1), OrderOf(flags.order));
  Say(text);
  return absl::OkStatus();
}

}  // namespace

SequenceOrder OrderOf(const std::string& text) {
  if (text == "hottest") return SequenceOrder::kHottest;
  return text == "largest" ? SequenceOrder::kLargest : SequenceOrder::kColdest;
}

absl::StatusOr<DaemonSnapshot> TakeSnapshot(client::Client& client) {
  DaemonSnapshot snapshot;
  snapshot.address = client.address();
  snapshot.serving = client.CheckHealth().ok();
  KVTIDE_ASSIGN_OR_RETURN(snapshot.info, client.GetServerInfo());
  KVTIDE_ASSIGN_OR_RETURN(snapshot.stats, client.GetStats());
  KVTIDE_ASSIGN_OR_RETURN(snapshot.sequences, client.ListSequences());
  auto profiles = client::Calibrations(client).Report();
  // Daemons of before have no such verb.
  if (!profiles.ok() && profiles.status().code() != absl::StatusCode::kUnimplemented)
    return profiles.status();
  if (profiles.ok()) snapshot.profiles = *std::move(profiles);
  return snapshot;
}

void AddStatusCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<StatusFlags>();
  CLI::App* status = app.add_subcommand("status", "Show what a running kvtided holds");
  status->footer(
      "Examples:\n"
      "  kvtide status\n"
      "  kvtide status --address 127.0.0.1:7600 --sequences 50\n"
      "  kvtide status --order hottest\n"
      "  kvtide status --output json | jq .bits_per_value");
  flags->daemon.AddTo(status);
  status->add_option("--output", flags->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
  status->add_option("--sequences", flags->sequences, "How many sequences to list; 0 = none")
      ->capture_default_str();
  status->add_option("--order", flags->order, "Which of them: coldest (longest idle), hottest or largest")
      ->check(CLI::IsMember({"coldest", "hottest", "largest"}))
      ->capture_default_str();
  status->callback([flags, exit_code] {
    const absl::Status done = RunStatus(*flags);
    if (!done.ok()) {
      SayFailed("kvtide status", done);
      std::fprintf(stderr, "`kvtide doctor` looks for the cause.\n");
    }
    *exit_code = ExitCode(done);
  });
}

}  // namespace kvtide::cli
