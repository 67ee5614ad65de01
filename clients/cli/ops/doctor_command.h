// `kvtide doctor`: is the daemon there, and is this machine fit for it?
#pragma once

#include "CLI/CLI.hpp"

namespace kvtide::cli {

// Exit codes: 0 (nothing failed; there may be warnings), 1 (something failed), 2 (bad input).
void AddDoctorCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
