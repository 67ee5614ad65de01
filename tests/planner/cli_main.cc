// The planning commands alone, for the command-line tests.
#include <CLI/CLI.hpp>

#include "clients/cli/plan/fleet_command.h"
#include "clients/cli/plan/plan_command.h"
#include "clients/cli/plan/plan_flags.h"

int main(int argc, char** argv) {
  CLI::App app("kvtide planning commands");
  app.require_subcommand(1);
  int exit_code = 0;
  kvtide::cli::AddPlanCommand(app, &exit_code);
  kvtide::cli::AddFleetCommand(app, &exit_code);
  try {
    app.parse(kvtide::cli::WithEngineWords(argc, argv));
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kvtide::cli::kExitBadInput;
  }
  return exit_code;
}
