// `kvtide config check|show`: what a kvtided would run with, and where each value comes from. It reads what
// kvtided reads, by the same code: the file, the environment, flags.
#pragma once

#include "CLI/CLI.hpp"

namespace kvtide::cli {

void AddConfigCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
