// The file that lets a stopped evaluation go on: JSON with the key of the run and one list of results,
// replaced as a whole. A file of another run is refused.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace kvtide::cli {

// The list called `name`; null when `path` is empty or there is no such file. FAILED_PRECONDITION for another
// key.
absl::StatusOr<nlohmann::json> ReadStateFile(const std::string& path, const std::string& key,
                                             const std::string& name);

// Nothing with an empty path.
absl::Status WriteStateFile(const std::string& path, const std::string& key, const std::string& name,
                            const nlohmann::json& results);

absl::Status NotAState(const std::string& path, const std::string& why);

}  // namespace kvtide::cli
