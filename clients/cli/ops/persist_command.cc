#include "clients/cli/ops/persist_command.h"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/cli/terminal/command_status.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

struct PersistFlags {
  DaemonFlags daemon;
  std::vector<uint64_t> sequences;
  bool all = false;
};

absl::Status RunPersist(const PersistFlags& flags) {
  if (flags.all != flags.sequences.empty())
    return absl::InvalidArgumentError(
        "give sequence ids (kvtide status lists them) or --all, one of the two");
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, flags.daemon.Connect());
  std::vector<client::SequenceId> ids(flags.sequences.begin(), flags.sequences.end());
  if (flags.all) {
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<client::SequenceInfo> sequences, client->ListSequences());
    for (const client::SequenceInfo& sequence : sequences)
      if (!sequence.seal_at_once) ids.push_back(sequence.id);
  }
  client::PersistResult result;
  if (!ids.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(result, client->PersistSequences(ids));
  }
  std::printf("%lld sequences with %lld tokens are durable; %lld blocks (%s) were written\n",
              static_cast<long long>(result.sequences), static_cast<long long>(result.tokens),
              static_cast<long long>(result.blocks), planner::FormatBytes(result.bytes).c_str());
  return absl::OkStatus();
}

}  // namespace

void AddPersistCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<PersistFlags>();
  CLI::App* persist = app.add_subcommand(
      "persist", "Make sequences of a running kvtided durable: there again after a restart");
  persist->footer(
      "Examples:\n"
      "  kvtide persist --all\n"
      "  kvtide persist 1234567890123456789 --address 127.0.0.1:7600\n"
      "The daemon needs a disk tier: kvtided --disk /var/lib/kvtide:100GiB");
  flags->daemon.AddTo(persist);
  persist->add_option("sequences", flags->sequences, "Ids, as kvtide status lists them");
  persist->add_flag("--all", flags->all, "Every sequence");
  persist->callback([flags, exit_code] {
    const absl::Status done = RunPersist(*flags);
    SayFailed("kvtide persist", done);
    *exit_code = ExitCode(done);
  });
}

}  // namespace kvtide::cli
