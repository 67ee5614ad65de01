// `kvtide connect ENGINE`: the command line, the configuration and the checks with which an engine on this
// machine uses kvtide.
#pragma once

#include <CLI/CLI.hpp>

namespace kvtide::cli {

// Exit codes: 0, 1 (the answer could not be written), 2 (bad input, or nothing fits).
void AddConnectCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
