// `kvtide top`: the daemon at work, redrawn every second. q or Ctrl-C ends it. Where nobody looks (no
// terminal) it prints one screen and ends.
#pragma once

#include "CLI/CLI.hpp"

namespace kvtide::cli {

// Exit codes: 0, 1 (the daemon cannot be reached), 2 (bad input).
void AddTopCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
