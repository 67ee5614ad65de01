// Whole small files: certificates, keys, tokens.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace kvtide {

// The bytes of a file that is not empty. INVALID_ARGUMENT says what was wanted, where and why not: "cannot
// read the certificate /etc/x.pem: No such file or directory".
absl::StatusOr<std::string> ReadTextFile(const char* what, const std::string& path);

}  // namespace kvtide
