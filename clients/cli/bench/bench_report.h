// What `kvtide bench` prints.
#pragma once

#include <string>

#include "clients/cli/bench/bench_run.h"
#include "clients/cli/terminal/terminal.h"

namespace kvtide::cli {

std::string RenderTable(const BenchReport& report, const Terminal& terminal);
std::string RenderJson(const BenchReport& report);

}  // namespace kvtide::cli
