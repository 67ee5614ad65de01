// `kvtide demo`: the main job end to end on this machine.
#pragma once

#include "CLI/CLI.hpp"

namespace kvtide::cli {

// Adds the subcommand. When it ran, *exit_code is 0, 1 (failed, or a continuation differed) or 2 (bad input).
void AddDemoCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
