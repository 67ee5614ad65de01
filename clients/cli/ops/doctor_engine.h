// What `kvtide doctor --engine` asks the Python of an engine: `python3 -m kvtide.doctor ENGINE` looks at what
// is installed there and sends a block to the daemon and back.
#pragma once

#include <string>
#include <vector>

#include "clients/cli/ops/doctor_checks.h"

namespace kvtide::cli {

// `python`: the interpreter of the engine's environment. Runs for up to a minute or so: engines import
// slowly.
std::vector<Finding> ExamineEngine(const std::string& engine, const std::string& python,
                                   const std::string& address);

// The answer of kvtide.doctor: a JSON array of {"verdict": "ok" | "warn" | "fail", "subject", "text",
// "advice"}, and the exit code of the interpreter; -1 = it did not start.
std::vector<Finding> EngineFindings(const std::string& engine, const std::string& python,
                                    const std::string& output, int exit_code);

}  // namespace kvtide::cli
