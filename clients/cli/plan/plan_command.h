// `kvtide plan` and `kvtide plan verify`. Exit codes: 0 everything fits, 3 fits only with tiers or with
// sequences that wait in the engine's queue, 4 does not fit, 2 bad input, 1 the answer could not be written,
// 5 verify found an item beyond its tolerance.
#pragma once

#include <CLI/CLI.hpp>

namespace kvtide::cli {

inline constexpr int kExitBadInput = 2;
inline constexpr int kExitFitsWithTiers = 3;
inline constexpr int kExitDoesNotFit = 4;
inline constexpr int kExitBeyondTolerance = 5;
inline constexpr int kExitNotWritten = 1;

// Runs in the callback of the subcommand and leaves the exit code in *exit_code, which outlives the app.
void AddPlanCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
