// Exit codes of commands: 0 done, 1 failed, 2 bad input, 130 stopped by the user; and how they say that they
// failed.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace kvtide::cli {

int ExitCode(const absl::Status& status);

// A report on standard output, PrintableLines. JSON (JsonText) comes out as it is.
void Say(const std::string& report);

// "COMMAND: MESSAGE" on standard error, as it may be shown: messages carry names that others chose. Of a
// message of several lines, such as the end of a daemon's log, those after the first are indented: none looks
// like one of the program's own. Nothing when it is OK.
void SayFailed(const std::string& command, const absl::Status& status);

}  // namespace kvtide::cli
