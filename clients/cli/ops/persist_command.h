// `kvtide persist`: makes sequences of a running kvtided durable.
#pragma once

#include "CLI/CLI.hpp"
#include "clients/cli/ops/daemon_flags.h"

namespace kvtide::cli {

void AddPersistCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
