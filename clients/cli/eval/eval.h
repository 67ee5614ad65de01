// `kvtide eval`: measures what pairs of cache types do to a model's predictions.
#pragma once

#include "CLI/CLI.hpp"

namespace kvtide::cli {

// Adds the subcommand. When it ran, *exit_code is 0, 1 (failed), 2 (bad input) or 130 (stopped by the user).
void AddEvalCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
