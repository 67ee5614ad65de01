// `kvtide fleet`: how many GPUs a mix of conversations needs and what a host tier is worth. Exit codes: 0
// done, 4 does not fit (one session is larger than the device, or more GPUs than allowed are needed), 2 bad
// input.
#pragma once

#include <CLI/CLI.hpp>

namespace kvtide::cli {

// Runs in the callback of the subcommand and leaves the exit code in *exit_code, which outlives the app.
void AddFleetCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
