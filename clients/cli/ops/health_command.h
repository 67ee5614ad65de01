// `kvtide health`: whether a daemon serves, as an exit code: for probes.
#pragma once

#include "CLI/CLI.hpp"

namespace kvtide::cli {

void AddHealthCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
