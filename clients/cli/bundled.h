// The model and the text that come with the program, wherever it runs: installed, in a build tree, or named
// by KVTIDE_DATA_DIR.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace kvtide::cli {

absl::StatusOr<std::string> BundledModelFolder();  // tidelm-7m
absl::StatusOr<std::string> BundledTextFile();     // wikitext2_slice.txt

// The whole file; NOT_FOUND and INVALID_ARGUMENT name it.
absl::StatusOr<std::string> ReadTextFile(const std::string& path);

}  // namespace kvtide::cli
