#include "clients/cli/terminal/command_status.h"

#include <cstdio>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "clients/cli/terminal/terminal.h"

namespace kvtide::cli {

int ExitCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kCancelled:
      return 130;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kUnimplemented:
      return 2;
    default:
      return 1;
  }
}

void Say(const std::string& report) {
  const std::string shown = PrintableLines(report);
  std::fwrite(shown.data(), 1, shown.size(), stdout);
}

void SayFailed(const std::string& command, const absl::Status& status) {
  if (status.ok()) return;
  // Line by line, not by PrintableLines: a message has no colours of the program's.
  std::vector<std::string> lines = absl::StrSplit(absl::StripTrailingAsciiWhitespace(status.message()), '\n');
  for (std::string& line : lines) line = Printable(line);
  std::fprintf(stderr, "%s: %s\n", command.c_str(), absl::StrJoin(lines, "\n  ").c_str());
}

}  // namespace kvtide::cli
