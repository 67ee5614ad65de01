// `kvtide capture`: runs a model over a text and keeps what its attention layers saw, for `kvtide eval
// --captured`.
#pragma once

#include "CLI/CLI.hpp"

namespace kvtide::cli {

// Adds the subcommand. When it ran, *exit_code is 0, 1 (failed), 2 (bad input) or 130 (stopped by the user).
void AddCaptureCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
