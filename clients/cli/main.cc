// kvtide: the one command line. Each subcommand has a file of its own and leaves its exit code; this one only
// puts them together.
#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>

#include "clients/cli/capture.h"
#include "clients/cli/demo.h"
#include "clients/cli/doctor_command.h"
#include "clients/cli/eval.h"
#include "clients/cli/fleet_command.h"
#include "clients/cli/plan_command.h"
#include "clients/cli/status_command.h"
#include "clients/cli/top_command.h"

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
      "  kvtide eval --model DIR --text FILE --pairs f16/f16,turbo4/turbo4\n"
      "  kvtide status                                     what a running kvtided holds\n"
      "`kvtide COMMAND --help` explains each. KVTIDE_ADDRESS names the daemon, NO_COLOR turns colours off.");
  int exit_code = 0;
  kvtide::cli::AddDemoCommand(app, &exit_code);
  kvtide::cli::AddPlanCommand(app, &exit_code);
  kvtide::cli::AddFleetCommand(app, &exit_code);
  kvtide::cli::AddEvalCommand(app, &exit_code);
  kvtide::cli::AddCaptureCommand(app, &exit_code);
  kvtide::cli::AddStatusCommand(app, &exit_code);
  kvtide::cli::AddTopCommand(app, &exit_code);
  kvtide::cli::AddDoctorCommand(app, &exit_code);
  constexpr int kBadInput = 2;
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kBadInput;
  }
  return exit_code;
}
