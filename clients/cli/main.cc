// kvtide: the one command line. Each subcommand has a file of its own and leaves its exit code; this one only
// puts them together.
#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <string>
#include <vector>

#include "clients/cli/bench/bench_command.h"
#include "clients/cli/calibrate/calibrate.h"
#include "clients/cli/capture/capture.h"
#include "clients/cli/completion/completion.h"
#include "clients/cli/completion/manual.h"
#include "clients/cli/connect/connect_command.h"
#include "clients/cli/demo/demo.h"
#include "clients/cli/eval/eval.h"
#include "clients/cli/ops/config_command.h"
#include "clients/cli/ops/doctor_command.h"
#include "clients/cli/ops/health_command.h"
#include "clients/cli/ops/persist_command.h"
#include "clients/cli/ops/seq_command.h"
#include "clients/cli/ops/status_command.h"
#include "clients/cli/ops/top_command.h"
#include "clients/cli/plan/fleet_command.h"
#include "clients/cli/plan/plan_command.h"
#include "clients/cli/plan/plan_flags.h"
#include "clients/cli/plan/replay_command.h"
#include "clients/cli/terminal/terminal.h"
#include "planner/near_names.h"

namespace {

// Option and subcommand names of a parsed command line, for the arguments that none of them took.
std::string Unexpected(const CLI::App& app) {
  const CLI::App* at = &app;
  while (!at->get_subcommands().empty()) at = at->get_subcommands().front();
  std::vector<std::string> known;
  for (const CLI::Option* option : at->get_options())
    for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
  for (const CLI::App* command : at->get_subcommands([](const CLI::App*) { return true; }))
    known.push_back(command->get_name());
  return kvtide::planner::UnknownArguments(app.remaining(true), known);
}

}  // namespace

int main(int argc, char** argv) {
  // `kvtide ... | head` ends quietly by a failed write, not by a signal in the middle of a daemon's life.
  std::signal(SIGPIPE, SIG_IGN);
  CLI::App app("kvtide plans, runs and measures the KV cache of LLM inference servers.", "kvtide");
  app.set_version_flag("--version", "kvtide " KVTIDE_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Examples:\n"
      "  kvtide demo                                       the main job on this machine, no GPU needed\n"
      "  kvtide plan --model llama-3.1-8b --device 'RTX 4090' --context 8192,32768,131072\n"
      "  kvtide connect vllm --model MODEL                 how an engine uses kvtide on this machine\n"
      "  kvtide eval --model DIR --text FILE --pairs f16/f16,turbo4/turbo4\n"
      "  kvtide status                                     what a running kvtided holds\n"
      "`kvtide COMMAND --help` explains each. KVTIDE_ADDRESS names the daemon, NO_COLOR turns colours off.");
  int exit_code = 0;
  kvtide::cli::AddDemoCommand(app, &exit_code);
  kvtide::cli::AddPlanCommand(app, &exit_code);
  kvtide::cli::AddFleetCommand(app, &exit_code);
  kvtide::cli::AddReplayCommand(*app.get_subcommand("fleet"), &exit_code);
  kvtide::cli::AddConnectCommand(app, &exit_code);
  kvtide::cli::AddEvalCommand(app, &exit_code);
  kvtide::cli::AddCaptureCommand(app, &exit_code);
  kvtide::cli::AddCalibrateCommand(app, &exit_code);
  kvtide::cli::AddBenchCommand(app, &exit_code);
  kvtide::cli::AddStatusCommand(app, &exit_code);
  kvtide::cli::AddPersistCommand(app, &exit_code);
  kvtide::cli::AddTopCommand(app, &exit_code);
  kvtide::cli::AddSeqCommand(app, &exit_code);
  kvtide::cli::AddDoctorCommand(app, &exit_code);
  kvtide::cli::AddHealthCommand(app, &exit_code);
  kvtide::cli::AddConfigCommand(app, &exit_code);
  kvtide::cli::AddCompletionCommand(app, &exit_code);
  kvtide::cli::AddManualCommand(app, &exit_code);
  constexpr int kBadInput = 2;
  try {
    app.parse(kvtide::cli::WithEngineWords(argc, argv));
  } catch (const CLI::ParseError& error) {
    const bool mistyped = app.get_subcommands().empty() && !app.remaining().empty() &&
                          error.get_exit_code() == static_cast<int>(CLI::ExitCodes::RequiredError);
    if (mistyped || error.get_exit_code() == static_cast<int>(CLI::ExitCodes::ExtrasError)) {
      std::fprintf(stderr, "kvtide: %s\nRun with --help for more information.\n",
                   kvtide::cli::Printable(Unexpected(app)).c_str());
      return kBadInput;
    }
    if (error.get_exit_code() == 0) return app.exit(error);  // help, or the version
    std::fprintf(stderr, "%s\nRun with --help for more information.\n",
                 kvtide::cli::Printable(error.what()).c_str());
    return kBadInput;
  }
  return exit_code;
}
