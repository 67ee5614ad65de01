// Files, the terminal and plain HTTP for the planning commands.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvtide::cli {

// At most 256 MiB; "-" reads standard input.
absl::StatusOr<std::string> ReadFile(const std::string& path);

// What was printed has arrived, or the error that stopped it (a full disk, a closed pipe).
absl::Status FlushOutput();

// Whether an error is one of writing, not of what was asked.
bool IsWriteError(const absl::Status& status);

// Writes to a file beside the target and renames it, so that readers never see half of it.
absl::Status WriteFile(const std::string& path, const std::string& text);

// GET of http://host:port/path; 5 seconds, at most 64 MiB.
absl::StatusOr<std::string> HttpGet(const std::string& url);

// True for a terminal when NO_COLOR is unset or empty.
bool UseColor();

}  // namespace kvtide::cli
