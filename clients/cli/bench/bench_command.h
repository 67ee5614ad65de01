// `kvtide bench`: latency and bandwidth by way and by tier, beside what the machine can do.
#pragma once

#include "CLI/CLI.hpp"

namespace kvtide::cli {

void AddBenchCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
